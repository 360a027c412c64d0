package nbd_test

import (
	"bytes"
	"io"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends/nbd"
)

// TestAnsweredEarly holds that a WRITE that is answered before its data were sent does not return
// before, since they are the caller's then.
func TestAnsweredEarly(t *testing.T) {
	for _, errno := range []u32{0, 28} {
		for _, n := range []int{8<<10 + 1, 1 << 20} { // What is shorter is copied.
			each(t, forms, func(t *testing.T, r *rig) {
				p := pattern(0, n)
				is := r.write(p, 0)
				q, err := r.head()
				if err != nil {
					t.Fatal(err)
				}
				other := r.effect(r.c.Sync) // It comes behind the data.
				if errno == 0 {
					r.say(r.ok(q))
				} else {
					r.say(r.failed(q, errno, ""))
				}
				synctest.Wait()
				if len(is) > 0 {
					t.Fatalf("it returned while its data are being sent: %+v", <-is)
				}
				data := make([]byte, n)
				if _, err := io.ReadFull(r.nc, data); err != nil {
					t.Fatal(err)
				}
				got := <-is
				scribble(t, p)
				if (got.err == nil) != (errno == 0) {
					t.Error(got.err)
				}
				if diff := firstDifference(data, pattern(0, n)); diff != "" {
					t.Error(diff)
				}
				r.say(r.ok(r.next()))
				if got := <-other; got.err != nil {
					t.Error(got.err)
				}
				r.works()
			})
		}
	}
}

// TestAnsweredEarlyLost holds the same of a connection that ends before the data were sent.
func TestAnsweredEarlyLost(t *testing.T) {
	each(t, forms, func(t *testing.T, r *rig) {
		p := pattern(0, 1<<20)
		is := r.write(p, 0)
		q, err := r.head()
		if err != nil {
			t.Fatal(err)
		}
		r.say(r.ok(q))
		synctest.Wait()
		if len(is) > 0 {
			t.Fatalf("it returned while its data are being sent: %+v", <-is)
		}
		r.nc.Close()
		<-is // Whether it was written is not known; the server says that it was.
		scribble(t, p)()
		if _, err := r.c.WriteAt(p, 0); err == nil {
			t.Error("it goes on")
		}
	})
}

// TestAnsweredEarlyOnSocket is TestAnsweredEarly with a socket, whose buffer is full.
func TestAnsweredEarlyOnSocket(t *testing.T) {
	for _, f := range forms {
		client, server := socketpair(t)
		r := newRig(t, f, client, server, nbd.Options{})
		const n = 2 << 20
		want := pattern(0, n)
		for range 3 {
			p := bytes.Clone(want)
			is := r.call(func() (int, error) {
				n, err := r.c.WriteAt(p, 0)
				clear(p) // There is no zero in what was written.
				return n, err
			})
			q, err := r.head()
			if err != nil {
				t.Fatal(err)
			}
			r.say(r.ok(q))
			data := make([]byte, n)
			if _, err := io.ReadFull(server, data); err != nil {
				t.Fatal(err)
			}
			if got := <-is; got.n != n || got.err != nil {
				t.Errorf("%+v", got)
			}
			if diff := firstDifference(data, want); diff != "" {
				t.Error(diff)
			}
		}
	}
}
