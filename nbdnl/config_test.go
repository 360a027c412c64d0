package nbdnl

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

type noSocket struct{ syscall.Conn }

func TestConfigValidate(t *testing.T) {
	valid := func() Config {
		return Config{Sockets: []syscall.Conn{noSocket{}}, Size: 1 << 20, BlockSize: 512}
	}
	sockets := func(n int, flags Flags) func(*Config) {
		return func(c *Config) {
			c.Sockets = slices.Repeat([]syscall.Conn{noSocket{}}, n)
			c.Flags = flags
		}
	}
	blockSize := func(n int) func(*Config) { return func(c *Config) { c.BlockSize = n } }
	identifier := func(s string) func(*Config) { return func(c *Config) { c.Identifier = s } }
	dead := func(d time.Duration) func(*Config) { return func(c *Config) { c.DeadConnTimeout = d } }
	tests := []struct {
		name   string
		change func(*Config)
		want   string // part of the error; empty: valid
	}{
		{"valid", func(*Config) {}, ""},
		{"default block size", blockSize(0), ""},
		{
			"default block size, odd size", func(c *Config) { c.BlockSize, c.Size = 0, 512 },
			"size 512 is not a multiple of the block size 1024",
		},
		{"largest block size", blockSize(65536), ""},
		{"no socket", func(c *Config) { c.Sockets = nil }, "no socket"},
		{"nil socket", func(c *Config) { c.Sockets[0] = nil }, "socket 0 is nil"},
		{"two sockets", sockets(2, 0), "2 sockets need FlagCanMultiConn"},
		{"two sockets, allowed", sockets(2, FlagCanMultiConn), ""},
		{"too many sockets", sockets(1025, FlagCanMultiConn), "1025 sockets"},
		{"size 0", func(c *Config) { c.Size = 0 }, "size 0 is not positive"},
		{"negative size", func(c *Config) { c.Size = -512 }, "size -512 is not positive"},
		{"size with a tail", func(c *Config) { c.Size++ }, "size 1048577 is not a multiple of the block size 512"},
		{"block size 256", blockSize(256), "block size 256 is not a power of two from 512 to 65536"},
		{"block size 1000", blockSize(1000), "block size 1000"},
		{"block size 131072", blockSize(131072), "block size 131072"},
		{"negative block size", blockSize(-512), "block size -512"},
		{"timeouts", func(c *Config) { c.Timeout, c.DeadConnTimeout = time.Hour, maxTimeout }, ""},
		{"half a second", func(c *Config) { c.Timeout = time.Second / 2 }, "timeout 500ms is not in whole seconds"},
		{"negative timeout", func(c *Config) { c.Timeout = -time.Second }, "timeout -1s is not within"},
		{"timeout of a year", func(c *Config) { c.Timeout = 365 * 24 * time.Hour }, "timeout 8760h0m0s is not within"},
		{"dead for half a second", dead(time.Second / 2), "dead connection timeout 500ms"},
		{"identifier", identifier(strings.Repeat("é", 512)), ""},
		{"long identifier", identifier(strings.Repeat("a", 1025)), "identifier has 1025 bytes"},
		{"identifier of two lines", identifier("a\nb"), `identifier "a\nb" has a control character`},
		{"identifier with a zero", identifier("a\x00b"), "control character"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := valid()
			tt.change(&cfg)
			checkMessage(t, cfg.validate(), tt.want)
		})
	}
}

func TestUpdateValidate(t *testing.T) {
	size, odd, block, wrong, second, part := int64(4096), int64(4100), 512, 100, time.Second, time.Millisecond
	tests := []struct {
		name   string
		update Update
		want   string
	}{
		{"nothing", Update{}, ""},
		{"all", Update{Size: &size, BlockSize: &block, Timeout: &second, DeadConnTimeout: &second}, ""},
		{"size alone", Update{Size: &odd}, ""},
		{"size with a tail", Update{Size: &odd, BlockSize: &block}, "not a multiple"},
		{"block size", Update{BlockSize: &wrong}, "block size 100"},
		{"timeout", Update{Timeout: &part}, "timeout 1ms"},
		{"dead connection timeout", Update{DeadConnTimeout: &part}, "dead connection timeout 1ms"},
		{"size and sockets", Update{Size: &size, Sockets: []syscall.Conn{noSocket{}}}, "deadlock"},
		{"nil socket", Update{Sockets: []syscall.Conn{nil}}, "socket 0 is nil"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { checkMessage(t, tt.update.validate(), tt.want) })
	}
}

func checkMessage(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("got %v, want no error", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("got %v, want an error with %q", err, want)
	}
}
