package parcel

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns two ends of a connection.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ends := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { c.Close() })
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

type object struct {
	Text string `json:"text"`
	Data []byte `json:"data"`
}

// TestParcels sends objects with and without descriptors, short and long, one behind another.
func TestParcels(t *testing.T) {
	a, b := pair(t)
	dir := t.TempDir()
	const rounds = 20
	sent := make(chan error, 1)
	go func() {
		for i := range rounds {
			var f *os.File
			if i%3 != 0 {
				f, _ = os.CreateTemp(dir, "file")
				_, _ = f.WriteString(strings.Repeat("x", i))
			}
			if err := Send(a, object{strings.Repeat("y", i), make([]byte, i*100_000)}, f); err != nil {
				sent <- err
				return
			}
			if f != nil {
				f.Close()
			}
		}
		sent <- nil
	}()
	for i := range rounds {
		var o object
		f, err := Receive(b, &o)
		if err != nil {
			t.Fatal(err)
		}
		if len(o.Text) != i || len(o.Data) != i*100_000 || (f != nil) != (i%3 != 0) {
			t.Fatalf("object %d has %d and %d bytes, and the file %v", i, len(o.Text), len(o.Data), f)
		}
		if f == nil {
			continue
		}
		if st, err := f.Stat(); err != nil || st.Size() != int64(i) {
			t.Errorf("file %d: %v, %v", i, st, err)
		}
		f.Close()
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	a.Close()
	if _, err := Receive(b, new(object)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("after the end: %v", err)
	}
}

// TestParcelsWrong receives what is no parcel: it is an error, and no descriptor stays open.
func TestParcelsWrong(t *testing.T) {
	for name, sent := range map[string]string{
		"half a length":  "\x00\x00",
		"half an object": "\x00\x00\x00\x05{}",
		"too long":       "\xff\x00\x00\x00",
		"not JSON":       "\x00\x00\x00\x02}{",
		"another object": "\x00\x00\x00\x0a{\"text\":7}",
	} {
		before := open(t)
		a, b := pair(t)
		f, err := os.CreateTemp(t.TempDir(), "file")
		if err != nil {
			t.Fatal(err)
		}
		if err := SendFile(a, []byte(sent), f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		a.Close()
		if _, err := Receive(b, new(object)); err == nil {
			t.Errorf("%s is received", name)
		}
		b.Close()
		if after := open(t); after != before {
			t.Errorf("%s: %d descriptors are open, and were %d", name, after, before)
		}
	}
}

// TestReceiveLate has a deadline pass in front of a parcel, and in the middle of one.
func TestReceiveLate(t *testing.T) {
	for _, sent := range []string{"", "\x00\x00", "\x00\x00\x00\x09", "\x00\x00\x00\x09{\"te"} {
		a, b := pair(t)
		if _, err := a.Write([]byte(sent)); err != nil {
			t.Fatal(err)
		}
		if err := b.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := Receive(b, new(object)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("behind %q: %v", sent, err)
		}
	}
}

func open(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestReader reads what has no descriptor, or more than one is kept of.
func TestReader(t *testing.T) {
	r := &Reader{From: strings.NewReader("text")}
	if b, err := io.ReadAll(r); string(b) != "text" || err != nil || r.File != nil {
		t.Errorf("%q, %v, %v", b, err, r.File)
	}
	before := open(t)
	a, b := pair(t)
	for range 3 {
		f, err := os.CreateTemp(t.TempDir(), "file")
		if err != nil {
			t.Fatal(err)
		}
		if err := SendFile(a, []byte("x"), f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	a.Close()
	r = &Reader{From: b}
	if said, err := io.ReadAll(r); string(said) != "xxx" || err != nil || r.File == nil {
		t.Errorf("%q, %v, %v", said, err, r.File)
	}
	r.Close()
	b.Close()
	if after := open(t); after != before {
		t.Errorf("%d descriptors are open, and were %d", after, before)
	}
}
