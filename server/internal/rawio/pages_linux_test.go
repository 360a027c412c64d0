//go:build (amd64 || arm64) && !race && !nbd_portable

package rawio

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// filled makes a file with that content.
func filled(t *testing.T, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f
}

// sendPages sends pages over c, drops them, and returns what comes out at peer.
func sendPages(t *testing.T, c Conn, peer net.Conn, p *Pages) []byte {
	t.Helper()
	got := make([]byte, p.Len())
	done := make(chan error, 1)
	go func() { done <- c.SendPages(p) }()
	if _, err := io.ReadFull(peer, got); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || p.Len() != 0 {
		t.Fatalf("SendPages: %v, %d bytes left", err, p.Len())
	}
	p.Drop()
	return got
}

// pipesInUse is how many pipes there are when those in no use are closed.
func pipesInUse() int64 {
	for range 3 { // sync.Pool keeps what it has for two collections, and cleanups are run after another one.
		runtime.GC()
	}
	for range 1000 {
		if pipeCount.Load() == 0 {
			break
		}
		runtime.Gosched()
	}
	return pipeCount.Load()
}

func TestSendPages(t *testing.T) {
	want := pattern(3 << 20)
	f := filled(t, want)
	nc, peer := socketpair(t)
	c := New(nc)
	var p Pages
	for _, r := range []struct{ off, n int }{
		{0, 1}, {4095, 2}, {0, 64 << 10}, {0, 1 << 20}, {1, 1 << 20}, {4095, 1<<20 + 2},
		{1000, 3<<20 - 1000}, {3<<20 - 1, 1},
	} {
		if err := p.Take(f, int64(r.off), r.n); err != nil || p.Len() != r.n {
			t.Fatalf("%d bytes at %d: %d taken, %v", r.n, r.off, p.Len(), err)
		}
		if got := sendPages(t, c, peer, &p); !bytes.Equal(got, want[r.off:][:r.n]) {
			t.Errorf("%d bytes at %d: others came", r.n, r.off)
		}
	}
	if n := pipesInUse(); n != 0 {
		t.Errorf("%d pipes are held with nothing to do", n)
	}
}

// TestPagesOfFileThatShrinks holds that what was taken is sent, whatever becomes of the file.
func TestPagesOfFileThatShrinks(t *testing.T) {
	want := pattern(1 << 20)
	f := filled(t, want)
	nc, peer := socketpair(t)
	c := New(nc)
	var p Pages
	if err := p.Take(f, 0, len(want)); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if got := sendPages(t, c, peer, &p); !bytes.Equal(got, want) {
		t.Error("other bytes came")
	}
	if err := p.Take(f, 0, 1); err != io.ErrUnexpectedEOF {
		t.Errorf("of an empty file: %v", err)
	}
}

// TestPagesComeUpShort has the kernel give fewer bytes than were asked for, in every way: nothing
// is taken, and nothing of it is in the way of what comes next.
func TestPagesComeUpShort(t *testing.T) {
	want := pattern(2 << 20)
	f := filled(t, want)
	nc, peer := socketpair(t)
	c := New(nc)
	real := spliceIn
	t.Cleanup(func() { spliceIn = real })
	eio := func(int, int64, int, int) (int64, error) { return 0, syscall.EIO }
	end := func(int, int64, int, int) (int64, error) { return 0, nil }
	full := func(int, int64, int, int) (int64, error) { return 0, syscall.EAGAIN }
	interrupted := func(int, int64, int, int) (int64, error) { return 0, syscall.EINTR }
	half := func(fd int, off int64, pipe, n int) (int64, error) { return real(fd, off, pipe, (n+1)/2) }
	type splice = func(int, int64, int, int) (int64, error)
	tests := []struct {
		name  string
		calls []splice // then the real one
		err   error
	}{
		{"at once", []splice{end}, io.ErrUnexpectedEOF},
		{"error", []splice{eio}, syscall.EIO},
		{"end in the middle", []splice{half, end}, io.ErrUnexpectedEOF},
		{"error in the middle", []splice{half, half, eio}, syscall.EIO},
		{"full", []splice{half, full}, errNoRoom},
		{"in the second pipe", []splice{real, eio}, syscall.EIO},
		{"in pieces", []splice{interrupted, half, interrupted, half, half}, nil},
	}
	for _, tt := range tests {
		calls := tt.calls
		spliceIn = func(fd int, off int64, pipe, n int) (int64, error) {
			if len(calls) == 0 {
				return real(fd, off, pipe, n)
			}
			call := calls[0]
			calls = calls[1:]
			return call(fd, off, pipe, n)
		}
		n := 1 << 20 // in two pipes: it begins in the middle of a page
		if tt.err == nil {
			n = 100 << 10
		}
		var p Pages
		if err := p.Take(f, 1, n); !errors.Is(err, tt.err) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.err)
		}
		if tt.err != nil && (p.Len() != 0 || p.used != 0) {
			t.Errorf("%s: %d bytes in %d pipes are left", tt.name, p.Len(), p.used)
		}
		if tt.err == nil {
			if got := sendPages(t, c, peer, &p); !bytes.Equal(got, want[1:][:n]) {
				t.Errorf("%s: other bytes came", tt.name)
			}
		}
		spliceIn = real
		if err := p.Take(f, 5000, 200<<10); err != nil {
			t.Fatal(err)
		}
		if got := sendPages(t, c, peer, &p); !bytes.Equal(got, want[5000:][:200<<10]) {
			t.Errorf("%s: other bytes came afterwards", tt.name)
		}
	}
	if n := pipesInUse(); n != 0 {
		t.Errorf("%d pipes are left", n)
	}
}

// TestPagesBounds holds that there are lengths that do not fit, and a bound of pipes for the whole
// process.
func TestPagesBounds(t *testing.T) {
	f := filled(t, pattern(8<<20))
	var p Pages
	if err := p.Take(f, 0, 8<<20); err != errNoRoom || p.Len() != 0 {
		t.Errorf("8 MiB: %v, %d bytes are taken", err, p.Len())
	}
	many := make([]Pages, maxPipes()+1)
	for i := range many[1:] {
		if err := many[i].Take(f, 0, 4096); err != nil {
			t.Fatalf("pipe %d: %v", i, err)
		}
	}
	last := &many[len(many)-1]
	if err := last.Take(f, 0, 4096); err != errNoRoom {
		t.Errorf("beyond the bound: %v", err)
	}
	many[0].Drop()
	if err := last.Take(f, 0, 4096); err != nil {
		t.Errorf("when there is one again: %v", err)
	}
	for i := range many {
		many[i].Drop()
	}
	if n := pipesInUse(); n != 0 {
		t.Errorf("%d pipes are left", n)
	}
}

// TestPagesNoDescriptors holds that the lack of descriptors is no more than a reason to do without.
func TestPagesNoDescriptors(t *testing.T) {
	f := filled(t, pattern(8192))
	pipesInUse() // None is left in the pool.
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := syscall.Rlimit{Cur: 0, Max: limit.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	var p Pages
	err := p.Take(f, 0, 4096)
	if back := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); back != nil {
		t.Fatal(back)
	}
	if err != errNoRoom {
		t.Errorf("error %v", err)
	}
	if err := p.Take(f, 0, 4096); err != errNoRoom {
		t.Errorf("a moment later: %v", err)
	}
	noPipe.Store(0)
	if err := p.Take(f, 0, 4096); err != nil {
		t.Errorf("with descriptors: %v", err)
	}
	p.Drop()
}

// TestPagesPeerGone holds that pipes with something in them are not used again.
func TestPagesPeerGone(t *testing.T) {
	want := pattern(1 << 20)
	f := filled(t, want)
	nc, peer := socketpair(t)
	var p Pages
	if err := p.Take(f, 0, len(want)); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- New(nc).SendPages(&p) }()
	if _, err := io.ReadFull(peer, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	peer.Close()
	if err := <-done; err == nil && p.Len() > 0 {
		t.Error("no error")
	}
	p.Drop()
	nc, peer = socketpair(t)
	if err := p.Take(f, 0, 4096); err != nil {
		t.Fatal(err)
	}
	if got := sendPages(t, New(nc), peer, &p); !bytes.Equal(got, want[:4096]) {
		t.Error("other bytes came over the next connection")
	}
}

// BenchmarkPages shows that to send pages allocates nothing.
func BenchmarkPages(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "f"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(pattern(128 << 10)); err != nil {
		b.Fatal(err)
	}
	var p Pages
	drain := make([]byte, 128<<10)
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Take(f, 0, 128<<10); err != nil {
			b.Fatal(err)
		}
		part := &p.parts[0]
		if _, err := syscall.Read(part.pipe.r, drain); err != nil {
			b.Fatal(err)
		}
		part.left = 0
		p.Drop()
	}
}
