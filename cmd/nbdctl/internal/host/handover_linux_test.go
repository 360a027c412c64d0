package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// A heritage is what a process hands over, in a test that goes on with it in this process.
type heritage struct {
	store   *Store
	state   *stateDir
	control *net.UnixListener
	doc     blockdev.Document
	files   []*os.File
}

// inherited are what a backend has got.
var errInherited = errors.New("as far as the backend")

// handed makes the directory of a device, and what is handed over with a backend of one descriptor.
func handed(t *testing.T, p passage) *heritage {
	t.Helper()
	h := &heritage{store: &Store{dir: t.TempDir()}}
	var err error
	if h.state, err = h.store.newStateDir(t.Context(), &p.Record); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.state.lock.Close() })
	if h.control, err = listenControl(filepath.Join(h.state.path, "ctl")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.control.Close() })
	control, err := h.control.File()
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.CreateTemp(t.TempDir(), "image")
	if err != nil {
		t.Fatal(err)
	}
	h.files = []*os.File{control, again(t, h.state.lock), image}
	h.doc = blockdev.Document{Size: 1 << 20, BlockSize: 512}
	if h.doc.Note, err = json.Marshal(p); err != nil {
		t.Fatal(err)
	}
	return h
}

// again returns another descriptor of an open file.
func again(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// wholePassage is one that nothing is wrong with.
func wholePassage() passage {
	r := newRecord(uuidA, "disk")
	r.PID = 4711
	return passage{
		Version: 1, Record: *r, Backend: json.RawMessage(`{"half":"full"}`),
		Descriptors: []string{passControl, passLock, passBackend},
	}
}

// take has a new process take it.
func (h *heritage) take(t *testing.T, inherit func(context.Context, Spec, Inheritance) (*Backing, error)) (
	*succession, error,
) {
	t.Helper()
	asked := newRecord(uuidA, "disk")
	host := &Host{Store: h.store, record: *asked, Spec: asked.Spec, Inherit: inherit, logFile: new(logFile)}
	s := &succession{host: host}
	t.Cleanup(s.close)
	_, err := s.open(t.Context(), &h.doc, h.files)
	return s, err
}

// closed holds that all descriptors were closed.
func (h *heritage) closed(t *testing.T) {
	t.Helper()
	for i, f := range h.files {
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("descriptor %d was not closed: %v", i, err)
		}
	}
}

// TestInherit has a process get all that there is to get, and make nothing of it known before it
// has the device.
func TestInherit(t *testing.T) {
	p := wholePassage()
	p.Record.Spec.Options = []string{"key=file:/key"}
	var b bytes.Buffer
	if err := (secret.Set{"key": secret.New("sesame")}).Send(&b); err != nil {
		t.Fatal(err)
	}
	p.Secrets = b.Bytes()
	h := handed(t, p)
	before, err := os.ReadFile(filepath.Join(h.state.path, "state.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got Inheritance
	var spec Spec
	s, err := h.take(t, func(_ context.Context, s Spec, i Inheritance) (*Backing, error) {
		spec, got = s, i
		return &Backing{}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.host.logFile.mode != 0o600 {
		t.Errorf("the next log has mode %o", s.host.logFile.mode)
	}
	if spec.Secrets["key"].Reveal() != "sesame" || s.host.redactor.Text("open sesame") != "open ***" {
		t.Errorf("the secret is %q", spec.Secrets["key"].Reveal())
	}
	if string(got.State) != `{"half":"full"}` || got.Size != 1<<20 || got.BlockSize != 512 || len(got.Files) != 1 ||
		got.Files[0] != h.files[2] {
		t.Errorf("the backend gets %+v", got)
	}
	now, err := os.ReadFile(filepath.Join(h.state.path, "state.json"))
	if err != nil || !bytes.Equal(now, before) {
		t.Errorf("the record is %s before the device is taken over, %v", now, err)
	}
	// The socket is the same, and so is the lock.
	h.control.Close()
	go func() {
		c, err := s.control.Accept()
		if err == nil {
			_, _ = io.WriteString(c, "here")
			c.Close()
		}
	}()
	c, err := net.Dial("unix", filepath.Join(h.state.path, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if said, err := io.ReadAll(c); string(said) != "here" {
		t.Errorf("the control socket says %q, %v", said, err)
	}
	h.state.lock.Close()
	if held, err := lockHeld(filepath.Join(h.state.path, "lock")); !held || err != nil {
		t.Errorf("the lock is held: %v, %v", held, err)
	}
	if err := s.publish(); err != nil {
		t.Fatal(err)
	}
	r, err := readRecord(h.state.path)
	if err != nil {
		t.Fatal(err)
	}
	want := p.Record
	want.PID, want.Passage = os.Getpid(), passageVersion
	want.Log = r.Log // newStateDir makes it
	if diff := cmp.Diff(&want, r); diff != "" {
		t.Errorf("the record is another:\n%s", diff)
	}
	if left, err := filepath.Glob(filepath.Join(h.state.path, ".*")); len(left) != 0 || err != nil {
		t.Errorf("left are %v, %v", left, err)
	}
}

// TestInheritRefused hands over what a process must not take: it touches nothing, says why, and
// keeps no descriptor.
func TestInheritRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*passage)
		also   func(t *testing.T, h *heritage)
		code   exit.Code
		says   string
	}{
		{"a newer form", func(p *passage) { p.Version = 2 }, nil, exit.Unsupported,
			"in form 2, and this nbdctl knows form 1"},
		{"no form", func(p *passage) { p.Version = 0 }, nil, exit.Unsupported, "in form 0"},
		{"a descriptor too few", func(p *passage) { p.Descriptors = p.Descriptors[:2] }, nil, exit.Failure,
			"tells of 2 descriptors, and has sent 3"},
		{"two locks", func(p *passage) { p.Descriptors[2] = passLock }, nil, exit.Failure, "2 descriptors of its lock"},
		{"no control socket", func(p *passage) { p.Descriptors[0] = passBackend }, nil, exit.Failure,
			"0 descriptors of its control"},
		{"one that is not known", func(p *passage) { p.Descriptors[2] = "sceptre" }, nil, exit.Failure,
			"1 descriptors that are not known here"},
		{"not JSON of that form", nil, func(t *testing.T, h *heritage) {
			h.doc.Note = []byte(`{"version":1,"record":7}`)
		}, exit.Failure, "is not understood"},
		{"another device", func(p *passage) { p.Record.UUID = uuidB }, nil, exit.Failure, "serves the device"},
		{"another directory", nil, func(t *testing.T, h *heritage) {
			h.files[1].Close()
			f, err := os.CreateTemp(t.TempDir(), "lock")
			if err != nil {
				t.Fatal(err)
			}
			h.files[1] = f
		}, exit.Failure, "is not the one of the other process"},
		{"a directory that has gone", nil, func(t *testing.T, h *heritage) { os.RemoveAll(h.state.path) },
			exit.NotFound, "its state directory has gone"},
		{"no socket", nil, func(t *testing.T, h *heritage) {
			h.files[0].Close()
			h.files[0] = again(t, h.state.lock)
		}, exit.Failure, "control socket: "},
		{"a backend that fails", nil, nil, exit.Failure, errInherited.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := wholePassage()
			if tt.change != nil {
				tt.change(&p)
			}
			h := handed(t, p)
			if tt.also != nil {
				tt.also(t, h)
			}
			before, _ := os.ReadFile(filepath.Join(h.state.path, "state.json"))
			s, err := h.take(t, func(_ context.Context, _ Spec, i Inheritance) (*Backing, error) {
				i.Close()
				return nil, errInherited
			})
			if exit.Of(err) != tt.code || !strings.Contains(err.Error(), tt.says) || !errors.Is(s.refused, err) {
				t.Errorf("code %d, %v; want code %d, %q", exit.Of(err), err, tt.code, tt.says)
			}
			s.close()
			h.closed(t)
			if after, _ := os.ReadFile(filepath.Join(h.state.path, "state.json")); !bytes.Equal(before, after) {
				t.Errorf("the record is %s", after)
			}
		})
	}
}

// TestPassageFormat holds that what is written is what was written when the form was made, and that
// it is read whole (testdata/passage.json).
func TestPassageFormat(t *testing.T) {
	content, err := os.ReadFile("testdata/passage.json")
	if err != nil {
		t.Fatal(err)
	}
	var p passage
	if err := json.Unmarshal(content, &p); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(object(t, content), encoded(t, p)); diff != "" {
		t.Errorf("it is written as another (-old +new):\n%s", diff)
	}
	if p.Version != passageVersion {
		t.Errorf("the form is %d now: testdata/passage.json is of another, and has to be refused", passageVersion)
	}
	if _, err := sorted(p.Descriptors, make([]*os.File, len(p.Descriptors))); err != nil {
		t.Error(err)
	}
	if p.Record.PID != 4711 || p.Record.Spec.Kind != "memory" || string(p.Backend) != `{"half":"full"}` {
		t.Errorf("it is read as %+v", p)
	}
}

// TestControlFile sends descriptors along with a request.
func TestControlFile(t *testing.T) {
	dir := t.TempDir()
	l, err := listenControl(filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	c := newControl(l, func(_ context.Context, req request) (*Status, error) {
		if req.File == nil {
			got <- "nothing"
			return nil, nil
		}
		b, err := io.ReadAll(req.File)
		got <- string(b)
		return nil, err
	})
	defer c.close(errEnding)
	e := &Entry{Record: newRecord(uuidA, ""), dir: dir}
	for range 3 {
		f, err := os.CreateTemp(dir, "file")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString("content"); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		before := descriptors(t)
		if _, err := e.ask(t.Context(), request{Op: opHandOver, File: f}); err != nil {
			t.Fatal(err)
		}
		if said := <-got; said != "content" {
			t.Errorf("the file has %q", said)
		}
		c.drainForTest()
		if after := descriptors(t); after != before {
			t.Errorf("%d descriptors are open, and were %d", after, before)
		}
	}
	if _, err := e.ask(t.Context(), request{Op: opHandOver}); err != nil {
		t.Fatal(err)
	}
	if said := <-got; said != "nothing" {
		t.Errorf("the file has %q", said)
	}
}

// drainForTest waits until all is answered that was asked.
func (c *control) drainForTest() {
	for range cap(c.slots) - 1 { // The listener has one.
		c.slots <- struct{}{}
	}
	for range cap(c.slots) - 1 {
		<-c.slots
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestAskMoved asks a process whose device moves meanwhile.
func TestAskMoved(t *testing.T) {
	const moved = `{"version":1,"error":"another process has taken it over","code":6,"moved":true}`
	const status = `{"version":1,"status":{"record":{"version":1,"pid":9}}}`
	e, requests := answering(t, moved, moved, status)
	r := *e.Record
	r.UUID, r.PID = filepath.Base(e.dir), 815
	if err := r.write(e.dir); err != nil {
		t.Fatal(err)
	}
	s, err := e.Status(t.Context())
	if err != nil || s.Record.PID != 9 || e.PID != 815 {
		t.Errorf("%+v, %v; pid %d", s, err, e.PID)
	}
	for range 3 {
		if asked := <-requests; !strings.Contains(asked, `"status"`) {
			t.Errorf("asked is %s", asked)
		}
	}
	var all []string
	for range maxMoves {
		all = append(all, moved)
	}
	e, _ = answering(t, append(all, status)...)
	if _, err := e.Status(t.Context()); exit.Of(err) != exit.Busy {
		t.Errorf("after %d moves: %v", maxMoves, err)
	}
}

// TestListen reads what a successor reports.
func TestListen(t *testing.T) {
	for _, tt := range []struct {
		says string
		err  string // empty: it serves
		own  bool
	}{
		{`{"ready":{"pid":7}}`, "", false},
		{`{"error":"no","code":5}`, "no", true},
		{`{"error":"the other process says: no","code":1,"heard":true}`, "the other process says: no", false},
		{``, "ended before the device was ready", false},
		{`{}`, "an empty report", false},
	} {
		r := listen(strings.NewReader(tt.says))
		right := tt.err == "" && r.err == nil || r.err != nil && tt.err != "" && strings.Contains(r.err.Error(), tt.err)
		if r.own != tt.own || !right {
			t.Errorf("%s: %v, own %v", tt.says, r.err, r.own)
		}
	}
}
