package holder_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// TestFind holds which descriptors do not count: those that the caller knows of, and the one that
// keeps a device connected.
func TestFind(t *testing.T) {
	root := machine.Root(t.TempDir())
	write := func(name, content string) {
		t.Helper()
		path := root.Path(name)
		err := errors.Join(
			os.MkdirAll(filepath.Dir(path), 0o755),
			os.WriteFile(path, []byte(content), 0o644),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	own := strconv.Itoa(os.Getpid())
	write("sys/block/nbd3/dev", "43:96\n")
	write("dev/nbd3", "")
	for process, fds := range map[string][]string{"7": {"4", "5", "6"}, own: {"8"}} {
		write("proc/"+process+"/comm", "prog\n")
		for _, fd := range fds {
			write("proc/"+process+"/fdinfo/"+fd, "flags:\t0100000\n")
			link := root.Path("proc", process, "fd", fd)
			if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink("/dev/nbd3", link)); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("proc/7/fdinfo/6", "flags:\t012000000\n") // O_PATH
	keeps := false
	f := &holder.Finder{
		Root: root,
		DeviceNumber: func(path string) (string, bool) {
			return "43:96", strings.HasPrefix(path, root.Path("proc")) || path == root.Path("dev/nbd3")
		},
		Keeps: func(int) bool { return keeps },
	}
	mine := holder.Holder{Kind: holder.Process, PID: os.Getpid(), Comm: "prog", Path: "/dev/nbd3", Device: "nbd3"}
	other := mine
	other.PID = 7
	check := func(name string, want []holder.Holder, except ...holder.Descriptor) {
		t.Helper()
		got, err := f.Find(t.Context(), 3, except...)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: error %v (-want +got):\n%s", name, err, diff)
		}
	}
	check("all", []holder.Holder{other, mine})
	check("but one of two", []holder.Holder{other, mine}, holder.Descriptor{PID: 7, FD: 4})
	check("but any one of two", []holder.Holder{other, mine}, holder.Descriptor{PID: 7, FD: holder.AnyFD})
	check("but both", []holder.Holder{mine}, holder.Descriptor{PID: 7, FD: 4}, holder.Descriptor{PID: 7, FD: 5})
	keeps = true
	check("kept by this process", []holder.Holder{other})
	all, err := f.FindAll(t.Context(), 3, 4)
	if diff := cmp.Diff(map[int][]holder.Holder{3: {other}}, all); diff != "" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of two, one of which is not there: error %v (-want +got):\n%s", err, diff)
	}
}
