package server_test

import (
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server"
)

func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := export(t, newDisk(8192), server.Options{})
		a, b := connect(t, e), connect(t, e)
		a.expect(0, call{op: cmdRead, length: 1000})
		a.expect(0, call{op: cmdRead, length: 24})
		a.expect(einval, call{op: cmdRead, offset: 8192, length: 1})
		a.expect(0, call{op: cmdWrite, data: make([]byte, 512)})
		a.expect(0, call{op: cmdFlush})
		a.expect(einval, call{op: 99})
		b.expect(0, call{op: cmdRead, length: 1})
		b.expect(0, call{op: cmdTrim, length: 4096})
		b.expect(0, call{op: cmdZero, length: 2048})
		b.expect(enospc, call{op: cmdZero, offset: 8000, length: 2048})

		wantA := server.Stats{
			Read:    server.OpStats{Requests: 3, Bytes: 1024, Errors: 1},
			Write:   server.OpStats{Requests: 1, Bytes: 512},
			Flush:   server.OpStats{Requests: 1},
			Unknown: server.OpStats{Requests: 1, Errors: 1},
		}
		wantB := server.Stats{
			Read:        server.OpStats{Requests: 1, Bytes: 1},
			Trim:        server.OpStats{Requests: 1, Bytes: 4096},
			WriteZeroes: server.OpStats{Requests: 2, Bytes: 2048, Errors: 1},
		}
		sum := wantA
		sum.Read = server.OpStats{Requests: 4, Bytes: 1025, Errors: 1}
		sum.Trim, sum.WriteZeroes = wantB.Trim, wantB.WriteZeroes

		check := func(when string) {
			t.Helper()
			synctest.Wait() // A request is in flight until its reply is on its way.
			for _, tt := range []struct {
				name      string
				got, want server.Stats
			}{
				{"one connection", a.conn.Stats(), wantA}, {"the other", b.conn.Stats(), wantB},
				{"the export", e.Stats(), sum},
			} {
				if diff := cmp.Diff(tt.want, countsOf(tt.got)); diff != "" {
					t.Errorf("%s, stats of %s (-want +got):\n%s", when, tt.name, diff)
				}
			}
		}
		check("both connected")
		a.disconnect()
		check("one connected")
		b.disconnect()
		check("none connected")
	})
}

// countsOf leaves out how long the requests took.
func countsOf(s server.Stats) server.Stats {
	for _, op := range []*server.OpStats{&s.Read, &s.Write, &s.Flush, &s.Trim, &s.WriteZeroes, &s.Unknown} {
		op.Latency = server.Histogram{}
	}
	return s
}
