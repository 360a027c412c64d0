package secret

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxLength of a value, in bytes: longer than any key, and less than what a pipe takes at once.
const maxLength = 16 << 10

// Ways says how a user gives a secret.
const Ways = "file:PATH, a file that holds it, or fd:N, a descriptor to read it from, as in fd:3 3<FILE"

// A Reference says where a secret is to be read, and is none itself. The environment is no such
// place: every program that is started from there has it too.
type Reference struct {
	path string
	fd   int // where path is empty
}

// ErrLiteral is the error of what is no reference, as a password in its place. It does not repeat
// it.
var ErrLiteral = errors.New("is secret, and the command line is not: everybody can read it; give " + Ways)

// ParseReference reads the value of an option that is secret.
func ParseReference(v string) (Reference, error) {
	where, what, _ := strings.Cut(v, ":")
	switch {
	case where == "file" && what != "":
		return Reference{path: what}, nil
	case where == "fd":
		n, err := strconv.ParseUint(what, 10, 31)
		if err == nil && n != 1 && n != 2 {
			return Reference{fd: int(n)}, nil
		}
	}
	return Reference{}, ErrLiteral
}

// Absolute is a reference that means the same in another working directory.
func (r Reference) Absolute() (Reference, error) {
	if r.path == "" {
		return r, nil
	}
	path, err := filepath.Abs(r.path)
	return Reference{path: path}, err
}

// String is the reference as it is typed.
func (r Reference) String() string {
	if r.path == "" {
		return fmt.Sprintf("fd:%d", r.fd)
	}
	return "file:" + r.path
}

// Read reads the secret, less a line feed at its end. Of descriptors those alone are read, to their
// end, of which inherited tells that the program was started with them.
func (r Reference) Read(inherited func(fd int) bool) (Value, error) {
	f, err := r.open(inherited)
	if err != nil {
		return Value{}, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxLength+2))
	if f != os.Stdin { // in whose place the next file would come
		err = errors.Join(err, f.Close())
	}
	value := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	switch {
	case err != nil:
		return Value{}, err
	case value == "":
		return Value{}, fmt.Errorf("%s: is empty", r)
	case len(value) > maxLength:
		return Value{}, fmt.Errorf("%s: is longer than %d bytes", r, maxLength)
	}
	return New(value), nil
}

func (r Reference) open(inherited func(fd int) bool) (*os.File, error) {
	switch {
	case r.path != "":
		return os.Open(r.path)
	case !inherited(r.fd):
		return nil, fmt.Errorf("%s: nbdctl was started without a descriptor %d", r, r.fd)
	}
	if r.fd == 0 {
		return os.Stdin, nil
	}
	return os.NewFile(uintptr(r.fd), r.String()), nil
}
