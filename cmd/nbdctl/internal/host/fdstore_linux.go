package host

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A fdStore is where systemd keeps descriptors of a unit while that is being restarted, by the
// protocol of sd_notify(3). nil: there is none.
type fdStore struct {
	conn   *net.UnixConn
	stored []string // names of what is there
}

// documentName is the name of the document of an estate in the store; its files are named by their
// numbers.
const documentName = "estate"

// storePatience bounds what systemd may take to store something.
const storePatience = 5 * time.Second

// openStore is the store of this unit.
func openStore() (*fdStore, error) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, errors.New("systemd gives no NOTIFY_SOCKET")
	}
	if name, abstract := strings.CutPrefix(path, "@"); abstract {
		path = "\x00" + name
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	return &fdStore{conn: c, stored: passedNames()}, nil
}

// passedNames are the names of the descriptors that systemd has passed to this process, in their
// order. It still has them, too.
func passedNames() []string {
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if pid, _ := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	return names[:min(n, len(names))]
}

func (s *fdStore) close() {
	if s != nil {
		s.conn.Close()
	}
}

// put stores an estate in the place of the one before, and waits until systemd has it. What is in
// both systemd would take for one, so there is a moment when it has neither whole.
func (s *fdStore) put(e *estate) error {
	if s == nil {
		return nil
	}
	if len(e.files)+1 > maxStored {
		return fmt.Errorf("%d descriptors, and systemd keeps %d", len(e.files)+1, maxStored)
	}
	if err := s.remove(); err != nil {
		return err
	}
	for i, f := range e.files {
		if err := s.store(strconv.Itoa(i), f); err != nil {
			return err
		}
	}
	document, err := memoryFile(e)
	if err != nil {
		return err
	}
	defer document.Close()
	if err := s.store(documentName, document); err != nil {
		return err
	}
	return s.barrier()
}

// clear has systemd let go of everything, and waits for that.
func (s *fdStore) clear() error {
	if s == nil {
		return nil
	}
	return errors.Join(s.remove(), s.barrier())
}

func (s *fdStore) remove() error {
	for _, name := range s.stored {
		if err := s.notify("FDSTOREREMOVE=1\nFDNAME="+name, nil); err != nil {
			return err
		}
	}
	s.stored = nil
	return nil
}

// store stores one file. systemd is not to mind whether its other end has hung up.
func (s *fdStore) store(name string, f *os.File) error {
	s.stored = append(s.stored, name)
	return s.notify("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, f)
}

// barrier waits until systemd has heeded everything before.
func (s *fdStore) barrier() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = errors.Join(s.notify("BARRIER=1", w), w.Close())
	if err == nil {
		err = r.SetReadDeadline(time.Now().Add(storePatience))
	}
	if err != nil {
		return err
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) { // It closes its copy.
		return fmt.Errorf("systemd has not taken the descriptors: %w", err)
	}
	return nil
}

// notify sends one message, with a copy of f if that is not nil.
func (s *fdStore) notify(text string, f *os.File) error {
	send := func(rights []byte) (err error) {
		if err = s.conn.SetWriteDeadline(time.Now().Add(storePatience)); err != nil {
			return err
		}
		raw, err := s.conn.SyscallConn()
		if err != nil {
			return err
		}
		werr := raw.Write(func(fd uintptr) bool {
			err = unix.Sendmsg(int(fd), []byte(text), rights, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			return err != unix.EAGAIN
		})
		return errors.Join(err, werr)
	}
	var err error
	if f == nil {
		err = send(nil)
	} else {
		err = withDescriptor(f, func(fd uintptr) error { return send(unix.UnixRights(int(fd))) })
	}
	if err != nil {
		return fmt.Errorf("systemd: %w", err)
	}
	return nil
}

// memoryFile is a file in memory with the document of an estate.
func memoryFile(e *estate) (*os.File, error) {
	b, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("nbdctl "+documentName, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), documentName)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// stored returns the estate that systemd has kept while this process was started again; nil: it has
// none that is whole.
func stored() (*estate, error) {
	files := make(map[string]*os.File)
	for i, name := range passedNames() {
		unix.CloseOnExec(firstFile + i)
		files[name] = os.NewFile(uintptr(firstFile+i), name)
	}
	e, err := estateOf(files)
	if e == nil {
		for _, f := range files {
			f.Close()
		}
	}
	return e, err
}

// estateOf makes an estate of its document and files, by their names; nil: something is missing.
func estateOf(files map[string]*os.File) (*estate, error) {
	document := files[documentName]
	if document == nil {
		return nil, nil
	}
	e := new(estate)
	b, err := io.ReadAll(io.NewSectionReader(document, 0, 1<<30))
	if err == nil {
		err = json.NewDecoder(bytes.NewReader(b)).Decode(e)
	}
	if err == nil {
		err = e.check()
	}
	if err != nil {
		return nil, err
	}
	for i := range e.Descriptors {
		f := files[strconv.Itoa(i)]
		if f == nil {
			return nil, nil
		}
		e.files = append(e.files, f)
	}
	document.Close()
	return e, nil
}
