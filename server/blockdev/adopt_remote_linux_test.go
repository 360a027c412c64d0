package blockdev

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestAdoptRemoteMismatch holds that a device is refused that is not the one, or for an export that
// does not fit, that each difference is named, and that nothing was touched.
func TestAdoptRemoteMismatch(t *testing.T) {
	const abilities = wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendTrim | wire.FlagSendWriteZeroes
	doc := func(change func(*Document)) func(*Document, *farExport) {
		return func(doc *Document, _ *farExport) { change(doc) }
	}
	export := func(change func(*farExport)) func(*Document, *farExport) {
		return func(_ *Document, e *farExport) { change(e) }
	}
	for name, tt := range map[string]struct {
		change func(*Document, *farExport)
		want   []string
	}{
		"identifier":  {doc(func(d *Document) { d.Identifier = "other" }), []string{"identifier"}},
		"incarnation": {doc(func(d *Document) { d.Incarnation++ }), []string{"incarnation"}},
		"idle":        {doc(func(d *Document) { d.Index, d.Incarnation = 4, 0 }), []string{"state"}},
		"size":        {func(d *Document, e *farExport) { d.Size *= 2; e.size *= 2 }, []string{"size"}},
		"block size":  {doc(func(d *Document) { d.BlockSize = 1024 }), []string{"block size"}},
		"used, and not told": {
			doc(func(d *Document) { d.Flags &^= nbdnl.Flags(abilities) }), []string{"flush", "fua", "trim"},
		},
		"larger":  {export(func(e *farExport) { e.size *= 2 }), []string{"export size"}},
		"smaller": {export(func(e *farExport) { e.size /= 2 }), []string{"export size"}},
		"fewer abilities": {
			export(func(e *farExport) { e.flags &^= abilities }),
			[]string{"export flush", "export fua", "export trim", "export zeroes"},
		},
		"read-only": {
			export(func(e *farExport) { e.flags |= wire.FlagReadOnly }), []string{"export read-only"},
		},
		"connections that may not agree": {
			export(func(e *farExport) { e.flags &^= wire.FlagCanMultiConn }), []string{"export multi-conn"},
		},
		"short requests": {export(func(e *farExport) { e.sizes.Maximum = 4096 }), []string{"max_sectors_kb"}},
		"several": {
			func(d *Document, e *farExport) { d.Identifier = "other"; e.size /= 2 },
			[]string{"identifier", "export size"},
		},
		// These are said in words of their own.
		"nothing left":        {export(func(e *farExport) { e.size = 0 }), nil},
		"blocks of 4K":        {export(func(e *farExport) { e.sizes.Minimum = 4096 }), nil},
		"very short requests": {export(func(e *farExport) { e.sizes.Maximum = 512 }), nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := farDevice(t, nbdnltest.Options{}, Options{DeadTimeout: time.Hour})
			f.export.flags |= abilities // which the device has only with its second connection
			if err := f.old.Close(); err != nil {
				t.Fatal(err)
			}
			var err error
			o := Options{Client: f.options.Client, Connections: 2}
			if f.old, err = f.machine.connectRemote(t.Context(), 3, f.export, o); err != nil {
				t.Fatal(err)
			}
			defer f.old.Close()
			before, open := f.Setting(3), watchedDescriptors(t, 2)
			h, export := f.handOver(t), f.export.again(t)
			doc := h.Document
			tt.change(&doc, export)
			begin := func() error { t.Error("it begins"); return nil }
			var said bytes.Buffer
			f.options.Logger = slog.New(slog.NewTextHandler(&said, nil))
			d, err := f.machine.takeOverRemote(t.Context(), doc, copies(t, h.Files), export, f.options, begin)
			if d != nil || err == nil || strings.Contains(said.String(), "it gets one") {
				t.Fatalf("it was adopted %t, and the log says %s", d != nil, said.String())
			}
			if diff := cmp.Diff(tt.want, mismatches(err)); diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			h.Resume()
			if diff := cmp.Diff(before, f.Setting(3)); diff != "" || f.Dead(3) != 0 || export.count() != 0 {
				t.Errorf("it was touched: %d dead, %d dialled (-want +got):\n%s", f.Dead(3), export.count(), diff)
			}
			if now := descriptors(t); len(now) != open {
				t.Errorf("there were %d descriptors, and now are %q", open, now)
			}
			talks(t, f.export.end(1), f.old.watchedOf(0).socket)
			talks(t, f.export.end(2), f.old.watchedOf(1).socket)
			if err := f.old.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, f.Kernel)
		})
	}
}

// TestAdoptRemoteFewer holds what is no difference: a device that uses less than the export can.
func TestAdoptRemoteFewer(t *testing.T) {
	f := farDevice(t, nbdnltest.Options{}, Options{ReadOnly: true})
	h, export := f.handOver(t), f.export.again(t)
	export.flags = wire.FlagHasFlags | wire.FlagSendFlush | wire.FlagSendTrim // It has one connection.
	next := f.adopts(t, h, export)
	if !next.ReadOnly() || next.flags&nbdnl.FlagSendTrim != 0 {
		t.Errorf("read-only %t, flags %v", next.ReadOnly(), next.flags)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, f.Kernel)
}

// TestAdoptRemoteRefused holds which documents are none, and that whoever goes on with a device can
// say only what its kind is for. Each leaves the device as it was, and no descriptor open.
func TestAdoptRemoteRefused(t *testing.T) {
	boom := errors.New("boom")
	fails := func(context.Context, *Document, []*os.File) (Remote, error) { return nil, boom }
	edit := func(change func(*Document)) func(*far, *Document, []*os.File) (*Device, error) {
		return func(f *far, doc *Document, files []*os.File) (*Device, error) {
			change(doc)
			return f.machine.takeOverRemote(context.Background(), *doc, files, f.export, f.options, nil)
		}
	}
	for name, tt := range map[string]struct {
		adopt func(f *far, doc *Document, files []*os.File) (*Device, error)
		want  string
	}{
		"of the first version": {edit(func(doc *Document) { doc.Version = 1 }), "of version 1"},
		"of a later version":   {edit(func(doc *Document) { doc.Version = 3 }), "of version 3"},
		"of a served device": {
			edit(func(doc *Document) { doc.Version, doc.Remote = 1, false }), "is served by a process",
		},
		"of neither kind": {edit(func(doc *Document) { doc.Remote = false }), "of version 2"},
		"with what was received": {
			edit(func(doc *Document) { doc.Connections[1].Unread = []byte{1} }), "were received",
		},
		"with missing sockets": {edit(func(doc *Document) { doc.Leased = true }), "came with 2 descriptors"},
		"with what is no socket": {func(f *far, doc *Document, files []*os.File) (*Device, error) {
			null, err := os.Open(os.DevNull)
			if err != nil {
				return nil, err
			}
			files[1].Close()
			files[1] = null
			return f.machine.takeOverRemote(context.Background(), *doc, files, f.export, f.options, nil)
		}, "non-socket"},
		"without an export": {func(f *far, doc *Document, files []*os.File) (*Device, error) {
			return f.machine.takeOverRemote(context.Background(), *doc, files, nil, f.options, nil)
		}, "no export"},
		"for a backend": {func(f *far, doc *Document, files []*os.File) (*Device, error) {
			return f.machine.takeOver(context.Background(), *doc, files, newElastic(), f.options, nil)
		}, "the kernel speaks with another server"},
		"not begun": {func(f *far, doc *Document, files []*os.File) (*Device, error) {
			begin := func() error { return boom }
			return f.machine.takeOverRemote(context.Background(), *doc, files, f.export, f.options, begin)
		}, "boom"},
	} {
		t.Run(name, func(t *testing.T) {
			f := farDevice(t, nbdnltest.Options{}, Options{Connections: 2})
			open := watchedDescriptors(t, 2)
			h := f.handOver(t)
			doc := h.Document
			doc.Connections = append([]HandedConnection(nil), doc.Connections...)
			d, err := tt.adopt(f, &doc, copies(t, h.Files))
			if d != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, %v", d, err)
			}
			h.Resume()
			f.unharmed(t, open)
		})
	}
	never := func(context.Context, *Document, []*os.File) (backends.Backend, error) {
		t.Error("a backend is opened")
		return nil, boom
	}
	for name, tt := range map[string]struct {
		open   Opener
		remote RemoteOpener
		want   string
	}{
		"by who has backends": {never, nil, "the kernel speaks with another server"},
		"by who has nothing":  {nil, nil, "the kernel speaks with another server"},
		"by who can't":        {never, fails, "boom"},
		"for no export":       {never, asks(nil), "no export"},
	} {
		t.Run(name, func(t *testing.T) {
			f := farDevice(t, nbdnltest.Options{}, Options{Connections: 2})
			ours, theirs := passage(t)
			open := watchedDescriptors(t, 2)
			handed := make(chan error, 1)
			go func() { handed <- f.old.HandOverTo(t.Context(), ours, HandOverOptions{}) }()
			d, err := f.machine.takeOverEither(t.Context(), theirs, tt.open, tt.remote, f.options)
			says := <-handed
			if d != nil || err == nil || !strings.Contains(err.Error(), tt.want) ||
				says == nil || !strings.Contains(says.Error(), tt.want) {
				t.Errorf("%v, %v; the old one: %v", d, err, says)
			}
			f.unharmed(t, open)
		})
	}
}

// unharmed holds that a device with two connections is as it was, and ends it.
func (f *far) unharmed(t *testing.T, open int) {
	t.Helper()
	if now := descriptors(t); len(now) != open || f.old.State() != nbdnl.StateLive {
		t.Errorf("it is %v, there were %d descriptors, and now are %q", f.old.State(), open, now)
	}
	talks(t, f.export.end(0), f.old.watchedOf(0).socket)
	talks(t, f.export.end(1), f.old.watchedOf(1).socket)
	if err := f.old.Close(); err != nil || f.export.count() != 2 {
		t.Errorf("%d connections were dialled, and it ends with %v", f.export.count(), err)
	}
	checkClean(t, f.Kernel)
}

// TestTakeOverServed holds that a served device goes to who has backends, and to nobody else.
func TestTakeOverServed(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 1)
	old := o.adopt(t)
	never := func(context.Context, *Document, []*os.File) (Remote, error) {
		t.Error("an export is opened")
		return nil, errors.New("none")
	}
	extra, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	for _, open := range []Opener{nil, opens(newElastic())} {
		ours, theirs := passage(t)
		before := watchedDescriptors(t, 1)
		handed := make(chan error, 1)
		go func() {
			handed <- old.HandOverTo(t.Context(), ours, HandOverOptions{Files: []*os.File{extra}})
		}()
		next, err := o.machine.takeOverEither(t.Context(), theirs, open, never, o.options)
		says := <-handed
		if open == nil {
			if !errors.Is(err, errors.ErrUnsupported) || says == nil || next != nil {
				t.Errorf("without backends: %v, %v", err, says)
			}
			if now := descriptors(t); len(now) != before {
				t.Errorf("there were %d descriptors, and now are %q", before, now)
			}
			read(t, o.kernel[0])
			continue
		}
		if err := errors.Join(err, says); err != nil {
			t.Fatal(err)
		}
		read(t, o.kernel[0])
		if err := next.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, o.Kernel)
	}
}
