package claim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/nbdnl/internal/backoff"
	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

// A Lease is the sole right to an index for as long as its holder likes, among all processes that
// ask for one: before a device is connected, while it lives, and between devices.
//
// A lease is a lock on a file, and ends with the process that holds it, however that ends. What
// stays is the file, with the identifier of the device: so the next to hold the lease knows that
// the device was left behind, and whose it was.
type Lease struct {
	index int
	left  string
	file  *os.File // flocked
}

// TryLease takes the lease of an index. The error matches ErrBusy when another process, or somebody
// else in this one, has it. It says nothing of the device.
//
// A lease is a lock on a file below leases.
func (d Dir) TryLease(index int) (*Lease, error) {
	l, err := d.tryLease(index)
	return l, wrap("lease", index, err)
}

func (d Dir) tryLease(index int) (*Lease, error) {
	if err := names.Check(index); err != nil {
		return nil, err
	}
	path := d.file("leases", index)
	c, err := claimLease(path)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		c, err = claimLease(path)
	}
	if err != nil {
		return nil, err
	}
	if c == nil {
		return nil, fmt.Errorf("%w: another process has leased it", ErrBusy)
	}
	l := &Lease{index: index, file: c.file}
	if l.left, err = noted(c.file); err != nil {
		return nil, errors.Join(err, l.Leave())
	}
	return l, nil
}

// leaseLooks is how often a lease is asked for of which somebody else is only finding out whether
// it is held (LeftAt). Between the looks there are pauses, for the other may have been interrupted
// where it holds the lock: in all a second and a half.
const leaseLooks = 36

// claimLease returns nil when somebody else has the lease.
func claimLease(path string) (*Claim, error) {
	pause := backoff.New()
	defer pause.Stop()
	for range leaseLooks {
		c, err := try(path)
		if c != nil || err != nil {
			return c, err
		}
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // It was given up.
		}
		if err != nil {
			return nil, err
		}
		held, err := lockedByOther(f)
		if err = errors.Join(err, f.Close()); held || err != nil {
			return nil, err
		}
		<-pause.After()
	}
	return nil, nil
}

// noted reads the identifier in the file of a lease.
func noted(f *os.File) (string, error) {
	b, err := io.ReadAll(f)
	identifier, _, _ := strings.Cut(string(b), "\n")
	return identifier, err
}

// LeftAt returns the identifier that the last holder of an index's lease noted, if its process has
// ended without a Release; else it is empty. The connected device with that identifier then has
// nobody who serves it. The lease itself is left to whoever asks for it with TryLease. Reading
// leases takes the privilege of taking them, else the error matches os.ErrPermission.
func (d Dir) LeftAt(index int) (string, error) {
	left, err := leftAt(d.file("leases", index))
	return left, wrap("lease", index, err)
}

func leftAt(path string) (left string, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if held, err := lockedByOther(f); held || err != nil || !isAt(f, path) {
		return "", err
	}
	return noted(f)
}

// Leased returns the indexes of which there is a lease, or was until its holder's process ended,
// ascending.
func (d Dir) Leased() ([]int, error) {
	entries, err := os.ReadDir(d.dir("leases"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	var indexes []int
	for _, e := range entries {
		if index, ok := names.Index(e.Name()); ok {
			indexes = append(indexes, index)
		}
	}
	slices.Sort(indexes)
	return indexes, nil
}

// Index returns the index.
func (l *Lease) Index() int { return l.index }

// Left returns the identifier that the former holder noted, if its process ended without a Release;
// else it is empty. The device with that identifier may still be connected.
func (l *Lease) Left() string { return l.left }

// Note writes down the identifier of the device that is about to be connected, so that it is known
// again if this process dies.
func (l *Lease) Note(identifier string) error {
	if err := names.CheckIdentifier(identifier); err != nil {
		return wrap("lease", l.index, err)
	}
	// What is left of a longer one comes after the end of the line.
	_, err := l.file.WriteAt([]byte(identifier+"\n"), 0)
	return wrap("lease", l.index, err)
}

// Release gives the lease up, and forgets what was noted.
func (l *Lease) Release() error { return wrap("lease", l.index, (&Claim{l.file}).Release()) }

// Leave gives the lease up, and leaves what is noted to the next holder, as the end of the process
// does.
func (l *Lease) Leave() error { return wrap("lease", l.index, l.file.Close()) }

// File returns a copy of the descriptor that holds the lease, for another process to inherit it.
// The lease is held until the last copy is closed: Leave, in place of Release, leaves it to the
// other process. The copy is the caller's.
func (l *Lease) File() (*os.File, error) {
	f, err := duplicate(l.file, l.file.Name())
	return f, wrap("lease", l.index, err)
}

// Inherit goes on with a lease of another process, of which f is what File has returned there. f
// belongs to the lease from then on, and is closed in case of an error, as when the lease was given
// up.
func (d Dir) Inherit(index int, f *os.File) (*Lease, error) {
	l, err := d.inherit(index, f)
	return l, wrap("inherit lease", index, err)
}

func (d Dir) inherit(index int, f *os.File) (_ *Lease, err error) {
	path := d.file("leases", index)
	if err := names.Check(index); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	named, err := duplicate(f, path)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	locked, err := tryLock(named) // It is, unless it was given up.
	switch {
	case err != nil:
	case !locked || !isAt(named, path):
		err = fmt.Errorf("%w: it was given up", ErrBusy)
	default:
		return &Lease{index: index, file: named}, nil
	}
	return nil, errors.Join(err, named.Close())
}
