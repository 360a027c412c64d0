package host

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/parcel"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/secret"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// estateVersion is that of the estates which this nbdctl writes and reads.
const estateVersion = 1

// An estate is what a serving process leaves to the one that takes its place when it dies. Its
// keeper has it meanwhile, and passes it on as it is.
type estate struct {
	Version int    `json:"version"`
	UUID    string `json:"uuid"`
	// Spec is what was to be served at first, and Secrets are those of it, as secret.Set sends
	// them.
	Spec    Spec            `json:"spec"`
	Secrets json.RawMessage `json:"secrets,omitempty"`
	// Environ is the environment of the process, for the next one.
	Environ []string `json:"environ,omitempty"`
	// Backend is Kept.State.
	Backend json.RawMessage `json:"backend,omitempty"`
	// Device is a blockdev.Document.
	Device blockdev.Document `json:"device"`
	// Descriptors are what the files are for, in their order: passControl, passBackend and
	// passDevice.
	Descriptors []string `json:"descriptors"`

	files []*os.File
}

// A will is what a serving process says to its keeper: it has one of the two.
type will struct {
	Estate *estate `json:"estate,omitempty"`
	// Released says that nobody is to take the place of the process.
	Released bool `json:"released,omitempty"`
}

// passDevice is a descriptor of blockdev.Device.Keep.
const passDevice = "device"

// add adds files of one kind, which are the estate's then.
func (e *estate) add(descriptor string, files ...*os.File) {
	e.files = append(e.files, files...)
	for range files {
		e.Descriptors = append(e.Descriptors, descriptor)
	}
}

// addSecrets adds the secrets of the spec.
func (e *estate) addSecrets(s secret.Set) error {
	if len(s) == 0 {
		return nil
	}
	var b bytes.Buffer
	err := s.Send(&b)
	e.Secrets = b.Bytes()
	return err
}

// close closes the files.
func (e *estate) close() {
	if e != nil {
		closeFiles(e.files)
	}
}

// of returns the files of one kind.
func (e *estate) of(descriptor string) (files []*os.File) {
	for i, d := range e.Descriptors {
		if d == descriptor {
			files = append(files, e.files[i])
		}
	}
	return files
}

// secrets are those of the spec.
func (e *estate) secrets() (secret.Set, error) {
	if len(e.Secrets) == 0 {
		return nil, nil
	}
	return secret.Receive(bytes.NewReader(e.Secrets))
}

// check says whether it is one that is understood.
func (e *estate) check() error {
	if e.Version != estateVersion {
		return exit.With(exit.Unsupported, "an estate in form %d, and this nbdctl knows form %d",
			e.Version, estateVersion)
	}
	return nil
}

// send sends it, with copies of the files.
func (e *estate) send(c *net.UnixConn) error {
	err := parcel.Send(c, will{Estate: e}, nil)
	for i := 0; i < len(e.files) && err == nil; i++ {
		err = parcel.Send(c, struct{}{}, e.files[i])
	}
	return err
}

// receiveWill receives what send has sent, or another will. The files of the estate belong to the
// caller.
func receiveWill(c *net.UnixConn) (w will, err error) {
	if f, err := parcel.Receive(c, &w); f != nil || err != nil {
		closeFile(f)
		if err == nil {
			err = fmt.Errorf("a descriptor that is not known here")
		}
		return will{}, err
	}
	e := w.Estate
	if e == nil {
		return w, nil
	}
	if err := e.check(); err != nil {
		return will{}, err
	}
	for range e.Descriptors {
		f, err := parcel.Receive(c, &struct{}{})
		if err == nil && f == nil {
			err = fmt.Errorf("a descriptor is missing")
		}
		if err != nil {
			e.close()
			return will{}, err
		}
		e.files = append(e.files, f)
	}
	return w, nil
}
