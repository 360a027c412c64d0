package exports

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/server"
)

// An entry is an export that is open, or is being opened or closed. Its Set guards it.
type entry struct {
	def     Definition
	backing *host.Backing
	export  *server.Export

	opened time.Time    // what it has served counts from then
	before server.Stats // what another process has served of that

	users     int
	transient bool // its last user closes it
	closing   bool // nobody uses it again

	// The rest is of images.
	file   fs.FileInfo   // as it was before it was opened
	ready  chan struct{} // closed when it is open, or has failed with err
	err    error
	closed chan struct{} // closed when it is
}

// open opens the backend and makes an export of it, whose log goes to w.
func (e *entry) open(w io.Writer) error {
	backing, err := kind.OpenExport(context.Background(), e.def.Spec)
	if err != nil {
		return e.error(err)
	}
	e.backing, e.opened = backing, time.Now()
	if err := e.offer(w); err != nil {
		return errors.Join(err, e.discard())
	}
	return nil
}

// offer makes an export of the backend.
func (e *entry) offer(w io.Writer) error {
	redactor := e.def.Spec.Secrets.Redactor()
	logger := slog.New(slog.NewTextHandler(redactor.Writer(w), nil))
	if e.def.Name != "" {
		logger = logger.With(slog.String("export", e.def.Name))
	}
	e.backing.Warnings = redactor.Texts(e.backing.Warnings)
	var err error
	e.export, err = server.NewExport(e.backing.Backend, server.Options{
		ReadOnly:    e.def.Spec.ReadOnly,
		BlockSize:   e.def.Spec.BlockSize,
		Description: e.def.Description,
		Logger:      logger,
	})
	return e.error(redactor.Error(err))
}

// describe changes the description of what is open; what is just being opened, or could not be,
// keeps the one that it has.
func (e *entry) describe(text string) {
	if e.ready != nil {
		select {
		case <-e.ready:
		default:
			return
		}
	}
	if e.export == nil || e.export.SetDescription(text) != nil {
		return
	}
	e.def.Description = text
}

// sync makes durable what was written, if anything was.
func (e *entry) sync() error {
	if e.backing == nil {
		return nil // It could not be opened.
	}
	d := backends.Probe(e.backing.Backend)
	st := e.stats()
	if d.Syncer == nil || st.Write.Requests+st.WriteZeroes.Requests+st.Trim.Requests == 0 {
		return nil
	}
	return e.error(e.def.Spec.Secrets.Redactor().Error(d.Syncer.Sync()))
}

// close makes durable what was written, and closes the backend.
func (e *entry) close() error {
	if e.backing == nil {
		return nil
	}
	err := e.sync()
	closed := e.error(e.def.Spec.Secrets.Redactor().Error(e.backing.Close()))
	e.backing = nil
	return errors.Join(err, closed)
}

// sharesImage reports whether a definition has the image of e, or whatever it stands on.
func (e *entry) sharesImage(d Definition) bool {
	return kind.TakesPath(d.Spec.Kind) && d.Spec.Kind == e.def.Spec.Kind && d.Spec.Arg == e.def.Spec.Arg
}

// error names the export in an error, unless it has no name.
func (e *entry) error(err error) error {
	if err == nil || e.def.Name == "" {
		return err
	}
	return fmt.Errorf("export %q: %w", e.def.Name, err)
}

// status is what the entry has served; ok is false if it is just being opened, or could not be.
func (e *entry) status() (st host.ExportStatus, ok bool) {
	if e.ready != nil {
		select {
		case <-e.ready:
		default:
			return st, false
		}
	}
	if e.err != nil || e.export == nil {
		return st, false
	}
	st = host.ExportStatus{
		Name: e.def.Name, Since: e.opened, Size: e.export.Size(), Clients: e.users, Stats: e.stats(),
	}
	if last := e.export.LastError(); last != nil {
		st.LastError = &host.Failure{
			Op: last.Op.String(), Offset: last.Offset, Length: last.Length,
			Error: e.def.Spec.Secrets.Redactor().Text(last.Err.Error()), Time: last.Time,
		}
	}
	return st, true
}

// stats is what was served since it was opened.
func (e *entry) stats() server.Stats {
	all := e.export.Stats()
	all.Add(&e.before)
	return all
}

// discard closes the backend, and removes what opening it has made.
func (e *entry) discard() error {
	b := e.backing
	e.backing = nil
	if b.Discard != nil {
		return b.Discard()
	}
	return b.Close()
}

func byName(a, b Definition) int { return strings.Compare(a.Name, b.Name) }
