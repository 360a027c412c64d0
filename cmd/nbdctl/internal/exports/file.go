package exports

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/kind"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
	"github.com/nbdctl/nbdctl/server/wire"
)

// version is that of the format of a file.
const version = 1

// maxFileName is NAME_MAX of <linux/limits.h>, in bytes.
const maxFileName = 255

// A Definition says what an export is.
type Definition struct {
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	Spec        host.Spec `json:"spec"`
}

// same reports whether both define the same export, whatever people are told of it.
func (d *Definition) same(e *Definition) bool {
	mine, other := d.Spec, e.Spec
	for _, s := range []*host.Spec{&mine, &other} { // None is none, also if it was written down.
		if len(s.Options) == 0 {
			s.Options = nil
		}
		if len(s.Secrets) == 0 {
			s.Secrets = nil
		}
	}
	return d.Name == e.Name && reflect.DeepEqual(&mine, &other)
}

// A Folder offers each image that lies in it when a client asks, by the name of its file.
type Folder struct {
	Path string `json:"path"`
	// Prefix comes before the name of a file in that of an export.
	Prefix string `json:"prefix,omitempty"`
	// Template is how an image is served; its Spec has no path.
	Template Definition `json:"template"`
}

// An Offer is what a server has for its clients. It is plain data, written as JSON but for the
// secrets.
type Offer struct {
	// Default is the name of the export for clients that name none; "": that of this name, if there
	// is one.
	Default string `json:"default,omitempty"`
	// Hidden has clients not told which exports there are.
	Hidden  bool         `json:"hidden,omitempty"`
	Exports []Definition `json:"exports,omitempty"`
	Folders []Folder     `json:"folders,omitempty"`
}

// The format of a file.
type (
	fileJSON struct {
		Version int          `json:"version"`
		Default string       `json:"default"`
		Hidden  bool         `json:"hidden"`
		Exports []exportJSON `json:"exports"`
		Folders []folderJSON `json:"folders"`
	}
	exportJSON struct {
		Name   string `json:"name"`
		Kind   string `json:"kind"`
		Arg    string `json:"arg"`
		Size   size   `json:"size"`
		Create bool   `json:"create"`
		commonJSON
	}
	folderJSON struct {
		Path   string `json:"path"`
		Prefix string `json:"prefix"`
		commonJSON
	}
	commonJSON struct {
		Description string            `json:"description"`
		ReadOnly    bool              `json:"read_only"`
		BlockSize   size              `json:"block_size"`
		Options     map[string]string `json:"options"`
	}
)

// A size is a number of bytes, or a string as it is typed.
type size int64

func (s *size) UnmarshalJSON(b []byte) error {
	text := string(b)
	if b[0] == '"' {
		if err := json.Unmarshal(b, &text); err != nil {
			return err
		}
	}
	n, err := quantity.ParseSize(text)
	if err != nil {
		return fmt.Errorf("%s: %w", b, err)
	}
	*s = size(n)
	return nil
}

// Read reads a file of exports. Relative paths in it are from where it lies. What it says wrong is
// a usage error, with the place.
func Read(path string) (Offer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Offer{}, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return Offer{}, fmt.Errorf("%s: no working directory: %w", path, err)
	}
	o, err := parse(data, dir)
	if err != nil {
		return Offer{}, exit.With(exit.Usage, "%s: %w", path, err)
	}
	return o, nil
}

func parse(data []byte, dir string) (Offer, error) {
	var f fileJSON
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return Offer{}, at(data, d.InputOffset(), err)
	}
	if d.More() {
		return Offer{}, at(data, d.InputOffset(), errors.New("something comes behind the end"))
	}
	if f.Version != version {
		return Offer{}, fmt.Errorf(`"version" is %d; this nbdctl knows %d`, f.Version, version)
	}
	o := Offer{Default: f.Default, Hidden: f.Hidden}
	for i, e := range f.Exports {
		def, err := e.definition(dir)
		if err != nil {
			return Offer{}, fmt.Errorf("export %q, number %d: %w", e.Name, i+1, err)
		}
		if slices.ContainsFunc(o.Exports, func(other Definition) bool { return other.Name == e.Name }) {
			return Offer{}, fmt.Errorf("export %q is there twice", e.Name)
		}
		o.Exports = append(o.Exports, def)
	}
	for i, e := range f.Folders {
		folder, err := e.folder(dir)
		if err != nil {
			return Offer{}, fmt.Errorf("folder %q, number %d: %w", e.Path, i+1, err)
		}
		o.Folders = append(o.Folders, folder)
	}
	switch {
	case len(o.Exports)+len(o.Folders) == 0:
		return Offer{}, errors.New(`neither "exports" nor "folders" has anything`)
	case o.Default != "" && len(o.Folders) == 0 &&
		!slices.ContainsFunc(o.Exports, func(d Definition) bool { return d.Name == o.Default }):
		return Offer{}, fmt.Errorf(`"default" is %q, and there is no such export`, o.Default)
	}
	return o, nil
}

// at adds to an error of JSON where it is.
func at(data []byte, offset int64, err error) error {
	var syntax *json.SyntaxError
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		offset = syntax.Offset
	case errors.As(err, &wrong):
		offset = wrong.Offset
	}
	before := data[:min(offset, int64(len(data)))]
	return fmt.Errorf("line %d: %w", 1+bytes.Count(before, []byte("\n")), err)
}

func (e *exportJSON) definition(dir string) (Definition, error) {
	d, err := e.commonJSON.definition(e.Name)
	if err != nil {
		return d, err
	}
	d.Spec.Kind, d.Spec.Arg, d.Spec.Size, d.Spec.Create = e.Kind, e.Arg, int64(e.Size), e.Create
	if block := max(1, int64(e.BlockSize)); d.Spec.Size%block != 0 {
		return d, fmt.Errorf("size %d: must be a multiple of the block_size %d", d.Spec.Size, block)
	}
	if err := kind.Check(d.Spec); err != nil {
		return d, err
	}
	if kind.TakesPath(e.Kind) && !filepath.IsAbs(e.Arg) {
		d.Spec.Arg = filepath.Join(dir, e.Arg)
	}
	d.Spec, err = kind.ReadSecrets(d.Spec)
	return d, err
}

// definition is what exports and images have in common.
func (c *commonJSON) definition(name string) (Definition, error) {
	d := Definition{Name: name, Description: c.Description}
	if err := wire.CheckString(name); err != nil {
		return d, fmt.Errorf("name: %w", err)
	}
	if err := wire.CheckString(c.Description); err != nil {
		return d, fmt.Errorf("description: %w", err)
	}
	if b := c.BlockSize; b != 0 && (b < 512 || b > 64<<10 || b&(b-1) != 0) {
		return d, fmt.Errorf("block_size %d: must be a power of two from 512 to 65536", b)
	}
	d.Spec.ReadOnly, d.Spec.BlockSize = c.ReadOnly, int(c.BlockSize)
	for _, key := range slices.Sorted(maps.Keys(c.Options)) {
		d.Spec.Options = append(d.Spec.Options, key+"="+c.Options[key])
	}
	return d, nil
}

func (e *folderJSON) folder(dir string) (Folder, error) {
	f := Folder{Path: e.Path, Prefix: e.Prefix}
	if e.Path == "" {
		return f, errors.New(`"path" is missing`)
	}
	if !filepath.IsAbs(f.Path) {
		f.Path = filepath.Join(dir, f.Path)
	}
	var err error
	if f.Template, err = e.commonJSON.definition(e.Prefix); err != nil {
		return f, err
	}
	// An image of no matter which name shows whether the options are possible.
	f.Template.Spec.Kind = "file"
	return f, kind.Check(f.image("x").Spec)
}

// image is the definition of a file of the folder.
func (f *Folder) image(name string) Definition {
	d := f.Template
	d.Name = f.Prefix + name
	d.Spec.Arg = filepath.Join(f.Path, name)
	return d
}

// find is the definition of the export of that name, if it can be one of the folder. The name is a
// client's: one that leads elsewhere, or begins with a dot, is none.
func (f *Folder) find(export string) (Definition, bool) {
	name, ok := strings.CutPrefix(export, f.Prefix)
	if !ok || !possible(name) {
		return Definition{}, false
	}
	return f.image(name), true
}

func possible(name string) bool {
	return name != "" && len(name) <= maxFileName && name[0] != '.' && !strings.ContainsAny(name, "/\x00") &&
		wire.CheckString(name) == nil
}
