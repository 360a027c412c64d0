package nbdnl

import (
	"errors"
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

// A sysfs reads what the kernel shows of devices under /sys/block.
type sysfs struct{ devices.Tree }

func newSysfs(s *System) sysfs { return sysfs{devices.New(s.root())} }

// cacheWriteBack is what queue/write_cache shows of a device to which the kernel sends flushes.
const cacheWriteBack = "write back"

// flags returns what the kernel acts upon of a connected device's flags, as far as sysfs shows it.
func (s sysfs) flags(index int) (Flags, error) {
	var flags Flags
	cached, err := s.cached(index)
	if err != nil {
		return 0, err
	}
	if cached {
		flags |= FlagSendFlush
	}
	for _, shown := range shownFlags {
		inForce := true
		for _, file := range shown.files {
			n, err := s.Number(index, file)
			if err != nil {
				return 0, err
			}
			inForce = inForce && n != 0
		}
		if inForce {
			flags |= shown.flag
		}
	}
	return flags, nil
}

// cached reports whether the kernel takes the device for one with a cache.
func (s sysfs) cached(index int) (bool, error) {
	cache, _, err := s.Attribute(index, "queue/write_cache")
	return cache == cacheWriteBack, err
}

// settings returns what sysfs shows of a connected device that can differ from what the kernel was
// asked for.
func (s sysfs) settings(index int) (Status, error) {
	st := Status{Index: index}
	block, err := s.Number(index, "queue/logical_block_size")
	if err != nil {
		return st, err
	}
	st.BlockSize = int(block)
	if st.Size, err = s.Size(index); err != nil {
		return st, err
	}
	st.Flags, err = s.flags(index)
	st.ReadOnly = st.Flags&FlagReadOnly != 0
	return st, err
}

// shownFlags are the flags that are in force when the numbers in some files are not zero.
var shownFlags = []struct {
	flag  Flags
	files []string
}{
	{FlagReadOnly, []string{"ro"}},
	{FlagSendFUA, []string{"queue/fua"}},
	{FlagRotational, []string{"queue/rotational"}},
	// Of the two, Linux 5.10 leaves the first as it is when a device ends (nbd_config_put).
	{FlagSendTrim, []string{"queue/discard_max_bytes", "queue/discard_granularity"}},
	{FlagSendWriteZeroes, []string{"queue/write_zeroes_max_bytes"}},
}

// requiredFlags are those on which correctness or the caller's promises depend; the kernel may do
// without the others.
var requiredFlags = []struct {
	flag    Flags
	setting string
}{
	{FlagSendFlush, "flush"},
	{FlagSendFUA, "fua"},
	{FlagSendTrim, "trim"},
}

// missing returns what a new device lacks of its configuration: nil, or one or more
// *UnsupportedError.
func (cfg *Config) missing(s Status) error {
	lack := shortfall{index: s.Index}
	lack.check("size", cfg.Size, s.Size)
	lack.check("block size", cfg.blockSize(), s.BlockSize)
	lack.check("read-only", cfg.Flags&FlagReadOnly != 0, s.ReadOnly)
	wanted := cfg.Flags
	if wanted&FlagSendFlush == 0 {
		// nbd_parse_flags: without a cache to write through there is no FUA, nor need for it.
		wanted &^= FlagSendFUA
	}
	for _, r := range requiredFlags {
		if wanted&r.flag != 0 {
			lack.check(r.setting, true, s.Flags&r.flag != 0)
		}
	}
	return errors.Join(lack.errs...)
}

// missing returns what a device lacks of the update: nil, or one or more *UnsupportedError.
func (u *Update) missing(s Status) error {
	lack := shortfall{index: s.Index}
	if u.Size != nil {
		lack.check("size", *u.Size, s.Size)
	}
	if u.BlockSize != nil {
		lack.check("block size", *u.BlockSize, s.BlockSize)
	}
	return errors.Join(lack.errs...)
}

// A shortfall collects what is not in force on a device.
type shortfall struct {
	index int
	errs  []error
}

func (l *shortfall) check(setting string, want, got any) {
	if want == got {
		return
	}
	l.errs = append(l.errs, &UnsupportedError{
		Index:   l.index,
		Setting: setting,
		Want:    fmt.Sprint(want),
		Got:     fmt.Sprint(got),
	})
}
