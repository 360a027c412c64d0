package nbdnl_test

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

func TestKernelSmoke(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := serve(t)
	id := nbdnl.NewIdentifier("test")
	i, err := c.Connect(t.Context(), nbdnl.Config{Sockets: []syscall.Conn{r.kernel}, Size: 1 << 20, BlockSize: 512, Timeout: 5 * time.Second, Identifier: id, Flags: nbdnl.FlagSendFlush})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(c.Status(t.Context(), i))
	t.Log(c.Devices(t.Context()))
	f, err := os.Open(nbdnl.Path(i))
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.Read(make([]byte, 4096))
	t.Log(n, err, f.Close())
	t.Log(c.ConnectIndex(t.Context(), i, nbdnl.Config{Sockets: []syscall.Conn{serve(t).kernel}, Size: 1 << 20, BlockSize: 512}))
	t.Log(c.Disconnect(t.Context(), i, "other"))
	if err := c.Disconnect(t.Context(), i, id); err != nil {
		t.Fatal(err)
	}
	t.Log(c.Status(t.Context(), i))
}
