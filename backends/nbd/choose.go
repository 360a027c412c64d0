package nbd

import (
	"context"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/server/wire"
)

// An Info is what a server tells of an export.
type Info struct {
	// Name is the name by which the server knows the export: the one that was asked for, unless it
	// has another.
	Name string `json:"name"`
	// Description is for people, and "" where the server has none.
	Description string `json:"description,omitempty"`
	// Size is in bytes.
	Size int64 `json:"size"`
	// Flags say what the export can do.
	Flags wire.Flags `json:"flags"`
	// BlockSizes are zero where the server tells none; then any range will do, up to 32 MiB.
	BlockSizes wire.BlockSizes `json:"block_sizes"`

	asked string // the name that was asked for
}

// A Listed is an export that a server has listed.
type Listed struct {
	Name    string
	Details string // for people
}

// A Context is a meta context of an export: something that is known of each of its bytes.
type Context struct {
	Name string `json:"name"`
	ID   uint32 `json:"id"` // on this connection
}

// Contexts are those that were agreed on.
type Contexts []Context

// find returns the context that has that number.
func (s Contexts) find(id uint32) (i int, ok bool) {
	for i := range s {
		if s[i].ID == id {
			return i, true
		}
	}
	return 0, false
}

// maxContexts bounds the contexts of a connection.
const maxContexts = 64

// An Agreement is how a connection is going to be used. It is plain data, which can be written as
// JSON for another process (Document, InheritDirect).
type Agreement struct {
	Info
	Structured bool     `json:"structured,omitempty"` // replies have chunks
	Extended   bool     `json:"extended,omitempty"`   // all headers are extended ones; includes Structured
	TLS        bool     `json:"tls,omitempty"`
	Contexts   Contexts `json:"contexts,omitempty"`
}

// A Session is a connection whose negotiation has ended with an export. Whoever has it goes on with
// a Client, or on NetConn: no byte was read beyond the negotiation.
type Session struct {
	NetConn net.Conn
	Agreement
}

// List asks which exports there are (NBD_OPT_LIST). Some servers do not tell.
func (h *Handshake) List(ctx context.Context) ([]Listed, error) {
	var all []Listed
	bytes := 0
	err := h.during(ctx, func() error {
		return h.ask(wire.OptList, nil, func(t wire.OptionReply, data []byte) error {
			name, details, ok := wire.ParseServer(data)
			if t != wire.RepServer || !ok || wire.CheckString(name) != nil {
				return protocolError("it lists an export that is none")
			}
			if bytes += len(data); bytes > maxListedBytes {
				return protocolError("its list of exports has more than %d bytes", maxListedBytes)
			}
			all = append(all, Listed{Name: name, Details: strings.ToValidUTF8(details, "\uFFFD")})
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// Info asks about an export (NBD_OPT_INFO).
func (h *Handshake) Info(ctx context.Context, name string) (Info, error) {
	return h.info(ctx, wire.OptInfo, name)
}

// Go ends the negotiation with an export (NBD_OPT_GO). After an *OptionError, it goes on.
func (h *Handshake) Go(ctx context.Context, name string) (*Session, error) {
	i, err := h.info(ctx, wire.OptGo, name)
	if err != nil {
		return nil, err
	}
	return h.chosen(i), nil
}

func (h *Handshake) info(ctx context.Context, o wire.Option, name string) (Info, error) {
	asked := wire.InfoRequest{
		Name:  name,
		Infos: []wire.Info{wire.InfoExport, wire.InfoName, wire.InfoDescription, wire.InfoBlockSize},
	}
	if err := wire.CheckString(name); err != nil {
		return Info{}, fmt.Errorf("nbd: export name: %w", err)
	}
	i := Info{Name: name, asked: name}
	told := false
	err := h.during(ctx, func() error {
		err := h.ask(o, asked.Append(nil), func(t wire.OptionReply, data []byte) error {
			if t != wire.RepInfo {
				return protocolError("its answer to %v is a reply of type %d", o, uint32(t))
			}
			export, err := i.take(data)
			told = told || export
			return err
		})
		if err == nil && !told {
			return protocolError("its answer to %v does not tell the size", o)
		}
		return err
	})
	if err != nil {
		return Info{}, err
	}
	return i, nil
}

// take reads the data of one reply of information. What is not known is passed over
// ("NBD_REP_INFO").
func (i *Info) take(data []byte) (export bool, err error) {
	kind, rest, ok := wire.ParseInfo(data)
	if !ok {
		return false, protocolError("it has an information without a type")
	}
	switch kind {
	case wire.InfoExport:
		size, flags, ok := wire.ParseExport(rest)
		if !ok {
			return false, protocolError("its information on size and flags has %d bytes", len(data))
		}
		return true, i.setExport(size, flags)
	case wire.InfoName, wire.InfoDescription:
		text := string(rest)
		if wire.CheckString(text) != nil {
			return false, protocolError("it has a text that is none: %.80q", text)
		}
		if kind == wire.InfoName {
			i.Name = text
		} else {
			i.Description = text
		}
	case wire.InfoBlockSize:
		b, ok := wire.ParseBlockSizes(rest)
		if !ok {
			return false, protocolError("its information on block sizes has %d bytes", len(data))
		}
		return false, i.setBlockSizes(b)
	}
	return false, nil
}

func (i *Info) setExport(size uint64, flags wire.Flags) error {
	if size > math.MaxInt64 {
		return protocolError("its export has %d bytes; at most %d are possible", size, int64(math.MaxInt64))
	}
	if flags&wire.FlagHasFlags == 0 {
		flags = wire.FlagHasFlags // "Transmission flags": the others must be ignored.
	}
	i.Size, i.Flags = int64(size), flags
	return nil
}

// setBlockSizes takes sizes that are possible.
func (i *Info) setBlockSizes(b wire.BlockSizes) error {
	if !possible(b) {
		return protocolError("its block sizes are impossible: %d, %d, %d", b.Minimum, b.Preferred, b.Maximum)
	}
	i.BlockSizes = b
	return nil
}

// possible reports whether sizes are as "Block size constraints" has them.
func possible(b wire.BlockSizes) bool {
	power := func(n uint32) bool { return n > 0 && n&(n-1) == 0 }
	return power(b.Minimum) && b.Minimum <= 64<<10 && power(b.Preferred) && b.Preferred >= b.Minimum &&
		b.Maximum >= b.Minimum && (b.Maximum == math.MaxUint32 || b.Maximum%b.Minimum == 0)
}

// ExportName ends the negotiation with an export as servers have it that do not know NBD_OPT_GO
// (NBD_OPT_EXPORT_NAME). Such a server hangs up where there is no such export.
func (h *Handshake) ExportName(ctx context.Context, name string) (*Session, error) {
	if err := wire.CheckString(name); err != nil {
		return nil, fmt.Errorf("nbd: export name: %w", err)
	}
	i := Info{Name: name, asked: name}
	err := h.during(ctx, func() error {
		if err := h.write(wire.AppendOption(nil, wire.OptExportName, []byte(name))); err != nil {
			return fmt.Errorf("nbd: %v: %w", wire.OptExportName, err)
		}
		data := make([]byte, wire.ExportNameSize(h.noZeroes))
		if err := h.read(data); err != nil {
			return fmt.Errorf("nbd: no export %q, perhaps: %w", name, err)
		}
		size, flags, _ := wire.ParseExport(data[:10])
		return i.setExport(size, flags)
	})
	if err != nil {
		return nil, err
	}
	return h.chosen(i), nil
}

// chosen is how the negotiation has ended.
func (h *Handshake) chosen(i Info) *Session {
	h.err = net.ErrClosed // It is over.
	if h.contextsOf != i.asked {
		h.contexts = nil // as the server has it ("NBD_OPT_SET_META_CONTEXT")
	}
	return &Session{NetConn: h.nc, Agreement: Agreement{
		Info: i, Structured: h.structured || h.extended, Extended: h.extended, TLS: h.tls, Contexts: h.contexts,
	}}
}

// ListContexts asks which meta contexts an export has (NBD_OPT_LIST_META_CONTEXT): those that fit a
// query, such as "base:" or "qemu:dirty-bitmap:", or all.
func (h *Handshake) ListContexts(ctx context.Context, export string, queries ...string) (Contexts, error) {
	return h.askContexts(ctx, wire.OptListMetaContext, export, queries)
}

// SetContexts chooses meta contexts by their names, in place of those that were chosen before
// (NBD_OPT_SET_META_CONTEXT). It returns those that the export has. They are for the export that is
// chosen afterwards, which must be this one.
func (h *Handshake) SetContexts(ctx context.Context, export string, names ...string) (Contexts, error) {
	var once []string // Some servers answer a name twice that they are asked for twice.
	for _, name := range names {
		if !slices.Contains(once, name) {
			once = append(once, name)
		}
	}
	all, err := h.askContexts(ctx, wire.OptSetMetaContext, export, once)
	h.contexts, h.contextsOf = all, export
	return all, err
}

func (h *Handshake) askContexts(ctx context.Context, o wire.Option, export string, queries []string) (Contexts, error) {
	for _, s := range append([]string{export}, queries...) {
		if err := wire.CheckString(s); err != nil {
			return nil, fmt.Errorf("nbd: %w", err)
		}
	}
	var all Contexts
	err := h.during(ctx, func() error {
		asked := wire.MetaRequest{Name: export, Queries: queries}
		return h.ask(o, asked.Append(nil), func(t wire.OptionReply, data []byte) error {
			id, name, ok := wire.ParseMetaContext(data)
			if t != wire.RepMetaContext || !ok || wire.CheckString(name) != nil {
				return protocolError("it tells of a meta context that is none")
			}
			if o == wire.OptSetMetaContext {
				_, twice := all.find(id)
				_, again := all.named(name)
				if twice || again || len(all) == maxContexts || !slices.Contains(queries, name) {
					return protocolError("it sets a context that was not asked for: %q, number %d", name, id)
				}
			}
			all = append(all, Context{Name: name, ID: id})
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}
