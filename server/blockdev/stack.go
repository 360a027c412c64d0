package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	nbdmachine "github.com/nbdctl/nbdctl/nbdnl/machine"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// A layer is a block device with a cache of its own that ends in an nbd device: the disk itself, a
// partition, what the kernel has made of these (device mapper, md, bcache, loop devices), or what
// stands on that in turn.
type layer struct {
	name   string // of its directory in sysfs, and mostly of its node
	dir    string // that directory
	number string // as in "43:96"

	// mark is a file in sysfs that the kernel makes when the layer comes to be where it is and
	// removes when it goes; incarnation is that of the file as it was found.
	mark        string
	incarnation nbdnl.Incarnation
}

// there reports whether the layer is still what it was: names and numbers are used again.
func (l layer) there() bool {
	now, err := nbdmachine.IncarnationOf(l.mark)
	return err == nil && now == l.incarnation
}

// look returns a layer, or false if it is not there.
func look(name, dir, mark string) (layer, bool) {
	number, err := os.ReadFile(filepath.Join(dir, "dev"))
	if err != nil {
		return layer{}, false
	}
	incarnation, err := nbdmachine.IncarnationOf(mark)
	return layer{
		name:        name,
		dir:         dir,
		number:      strings.TrimSpace(string(number)),
		mark:        mark,
		incarnation: incarnation,
	}, err == nil
}

// disk returns the lowest layer of an index, as long as that is the device of that incarnation.
func (m machine) disk(index int, incarnation nbdnl.Incarnation) (layer, bool) {
	name := filepath.Base(nbdnl.Path(index))
	dir := m.path("sys/block", name)
	l, ok := look(name, dir, filepath.Join(dir, "pid"))
	return l, ok && incarnation != 0 && l.incarnation == incarnation
}

// A stack is found from the disk upwards.
type stack struct {
	machine machine
	loops   map[string][]string // the names of the loop devices that are made of the block device with that number
	seen    map[string]bool     // by name; each layer is there once, however many ways lead to it
	layers  []layer             // from the top down: none comes before what stands on it
}

// stackOn returns all layers from the top down, the disk last.
func (m machine) stackOn(disk layer) ([]layer, error) {
	s := stack{machine: m, seen: make(map[string]bool)}
	if err := s.findLoops(); err != nil {
		return nil, err
	}
	err := s.climb(disk)
	return s.layers, err
}

// climb adds a layer, after all that stands on it.
func (s *stack) climb(l layer) error {
	if s.seen[l.name] {
		return nil
	}
	s.seen[l.name] = true
	above, err := s.above(l)
	for _, a := range above {
		if err == nil {
			err = s.climb(a)
		}
	}
	s.layers = append(s.layers, l)
	return err
}

// above returns what stands on a layer immediately.
func (s *stack) above(l layer) (above []layer, err error) {
	add := func(name, dir, mark string) {
		if a, ok := look(name, dir, mark); ok { // Or it has gone meanwhile.
			above = append(above, a)
		}
	}
	partitions, err := filepath.Glob(filepath.Join(l.dir, l.name+"*", "dev"))
	if err != nil {
		return nil, err
	}
	for _, p := range partitions {
		dir := filepath.Dir(p)
		add(filepath.Base(dir), dir, dir)
	}
	// Whatever claims a device for good is linked there (bd_link_disk_holder), but for loop
	// devices.
	holders := filepath.Join(l.dir, "holders")
	links, err := os.ReadDir(holders)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, h := range links {
		add(h.Name(), s.machine.path("sys/block", h.Name()), filepath.Join(holders, h.Name()))
	}
	for _, name := range s.loops[l.number] {
		dir := s.machine.path("sys/block", name)
		add(name, dir, filepath.Join(dir, "loop"))
	}
	return above, nil
}

// findLoops finds the loop devices that are made of block devices.
func (s *stack) findLoops() error {
	files, err := filepath.Glob(s.machine.path("sys/block/loop*/loop/backing_file"))
	if err != nil {
		return err
	}
	s.loops = make(map[string][]string)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // It has gone meanwhile.
		}
		if number, ok := s.machine.deviceNumber(strings.TrimSuffix(string(b), "\n")); ok {
			s.loops[number] = append(s.loops[number], filepath.Base(filepath.Dir(filepath.Dir(f))))
		}
	}
	return nil
}

// openLayer opens a layer's node, which udev may be about to make. It returns nil if the layer has
// gone meanwhile.
func (m machine) openLayer(ctx context.Context, l layer) (dev nbdnl.Device, err error) {
	err = awaitNode(ctx, func() error {
		dev, err = m.tryLayer(l)
		return err
	})
	if dev != nil && !l.there() {
		// Perhaps it is another's by now.
		return nil, dev.Close()
	}
	return dev, err
}

func (m machine) tryLayer(l layer) (nbdnl.Device, error) {
	for _, path := range m.nodes(l) {
		if number, ok := m.deviceNumber(path); !ok || number != l.number {
			continue
		}
		// Read-only is enough, and does not make udev look at the device when it is closed, as the
		// end of a write access does.
		dev, err := m.open(path, os.O_RDONLY)
		if err == nil || !errors.Is(err, os.ErrNotExist) && l.there() {
			return dev, err
		}
	}
	if !l.there() {
		return nil, nil
	}
	return nil, fmt.Errorf("%s, the node of the device %s, is missing or another device's: %w",
		m.nodes(l)[0], l.number, os.ErrNotExist)
}

// nodes returns where the device node of a layer may be.
func (m machine) nodes(l layer) []string {
	nodes := []string{"/dev/" + strings.ReplaceAll(l.name, "!", "/")} // A slash in a name is written so in sysfs.
	if b, err := os.ReadFile(filepath.Join(l.dir, "dm/name")); err == nil {
		nodes = append(nodes, "/dev/mapper/"+strings.TrimSpace(string(b))) // All that there is without udev.
	}
	return nodes
}
