// Command backup copies what has changed in an export to a file: backup SERVER CONTEXT FILE, where
// SERVER is an NBD URI, or the URL of an HTTP server that goes on with NBD when it is asked to.
// CONTEXT is a meta context such as qemu:dirty-bitmap:b0.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
)

func main() {
	if err := backup(context.Background(), os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "backup:", err)
		os.Exit(1)
	}
}

func backup(ctx context.Context, server, changed, path string) error {
	o := nbd.Options{Contexts: []string{changed}, ReadOnly: true}
	if _, rest, web := strings.Cut(server, "http://"); web {
		o.Dial = func(ctx context.Context) (net.Conn, error) { return upgrade(ctx, "http://"+rest) }
		server = "nbd://" + rest
	}
	disk, err := nbd.Dial(ctx, server, o)
	if err != nil {
		return err
	}
	defer disk.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	var failed error
	buf := make([]byte, 1<<20)
	err = disk.ContextExtents(changed, 0, disk.Size(), func(m backends.Mark) bool {
		if m.Flags&1 != 0 { // dirty
			to, from := io.NewOffsetWriter(out, m.Offset), io.NewSectionReader(disk, m.Offset, m.Length)
			_, failed = io.CopyBuffer(to, from, buf)
		}
		return failed == nil
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	return errors.Join(out.Truncate(disk.Size()), out.Sync())
}
