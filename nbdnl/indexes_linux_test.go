package nbdnl_test

import (
	"errors"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestAddIndex adds devices, and says why it can't.
func TestAddIndex(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{Devices: 2})
	c := k.Client()
	for _, index := range []int{1, 5, 5} {
		if err := c.AddIndex(t.Context(), index); err != nil {
			t.Error(err)
		}
		if st, err := c.Status(t.Context(), index); err != nil || st.State != nbdnl.StateIdle {
			t.Errorf("%d is %s, error %v", index, st.State, err)
		}
	}
	if got, err := c.Indexes(); !slices.Equal(got, []int{0, 1, 5}) || err != nil {
		t.Errorf("there are %v, error %v", got, err)
	}
	k.Fail(nbdnltest.Connect, syscall.ENOMEM)
	if err := c.AddIndex(t.Context(), 6); !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("error %v, want ENOMEM", err)
	}
	c = nbdnltest.New(t, nbdnltest.Options{NoPrivilege: true}).Client()
	if err := c.AddIndex(t.Context(), 20); !errors.Is(err, os.ErrPermission) {
		t.Errorf("error %v, want ErrPermission", err)
	}
}

// TestKernelAddIndex adds a device to the kernel, which complains of nothing.
func TestKernelAddIndex(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const index = 70
	for range 2 {
		if err := c.AddIndex(t.Context(), index); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(nbdnl.Path(index)); err != nil {
		t.Error(err)
	}
	if st, err := c.Status(t.Context(), index); err != nil || st.State != nbdnl.StateIdle {
		t.Errorf("it is %s, error %v", st.State, err)
	}
}
