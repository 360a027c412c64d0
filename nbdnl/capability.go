package nbdnl

import (
	"errors"
	"fmt"
)

// A capability is a combination of settings that a kernel puts in force.
type capability struct {
	flags     Flags
	blockSize int
}

// examine looks whether a new device is what it was to be, and remembers what does not show.
func (c *Client) examine(index int, cfg *Config) error {
	use, err := c.connected(index)
	if err != nil {
		return fmt.Errorf("it came and went: %w", err)
	}
	if use.Identified && use.Identifier != cfg.Identifier {
		return fmt.Errorf("it came and went: %w: its identifier is %q", ErrNotOwner, use.Identifier)
	}
	c.remember(index, use, func(m *memory) {
		m.connected, m.identifier, m.mode = true, cfg.Identifier, c.driver.mode()
		m.timed, m.timeout = true, cfg.Timeout
	})
	return c.check(index, cfg)
}

// check compares a new device with what it was to be. What a kernel makes of flags and a block size
// does not change, so that each of their combinations is looked at once; always the size, and what
// can be left of former users of the index.
func (c *Client) check(index int, cfg *Config) error {
	want := capability{cfg.Flags, cfg.blockSize()}
	c.mu.Lock()
	known := c.capabilities[want]
	c.mu.Unlock()
	if known {
		return c.checkPassing(index, cfg)
	}
	s, err := c.sysfs.settings(index)
	if err == nil {
		err = cfg.missing(s)
	}
	if err == nil {
		c.mu.Lock()
		c.capabilities[want] = true
		c.mu.Unlock()
	}
	return err
}

// checkPassing compares a new device with what it was to be in what does not depend on the kernel
// only.
func (c *Client) checkPassing(index int, cfg *Config) error {
	lack := shortfall{index: index}
	size, err := c.sysfs.Size(index)
	if err != nil {
		return err
	}
	lack.check("size", cfg.Size, size)
	if cfg.Flags&FlagSendFlush != 0 {
		// In Linux 6.12 a cache that somebody switched off stays so from one use to the next
		// (BLK_FLAG_WRITE_CACHE_DISABLED).
		cached, err := c.sysfs.cached(index)
		if err != nil {
			return err
		}
		lack.check("flush", true, cached)
	}
	return errors.Join(lack.errs...)
}
