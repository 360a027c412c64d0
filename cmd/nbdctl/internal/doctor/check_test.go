package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestCode shows which of several problems gives the exit code.
func TestCode(t *testing.T) {
	for _, tt := range []struct {
		want     exit.Code
		findings []Finding
	}{
		{exit.OK, nil},
		{exit.OK, []Finding{ok("fine"), warning("odd"), unknown("privilege")}},
		{exit.Failure, []Finding{problem(exit.Failure, "an orphan"), warning("odd")}},
		{exit.Unsupported, []Finding{problem(exit.Failure, "an orphan"), problem(exit.Unsupported, "no module")}},
		{exit.Permission, []Finding{
			problem(exit.Permission, "no privilege"),
			problem(exit.Unsupported, "no module"),
			problem(exit.Failure, "an orphan"),
		}},
	} {
		if got := Code(tt.findings); got != tt.want {
			t.Errorf("%v: code %d, want %d", tt.findings, got, tt.want)
		}
	}
}

// TestMend shows that remedies are done when asked for, and that what is said
// thereafter is what then is.
func TestMend(t *testing.T) {
	left := map[string]error{"one": nil, "two": fmt.Errorf("it is %w\nand held", fs.ErrPermission)}
	check := Check{"leftovers", func(context.Context) []Finding {
		findings := []Finding{}
		for _, name := range []string{"one", "two"} {
			err, there := left[name]
			if !there {
				continue
			}
			f := problem(exit.Failure, "%s is left", name).because("it fails").do("remove %s", name)
			f.Fix = func() (string, error) {
				if err != nil {
					return "", err
				}
				delete(left, name)
				return name + " removed", nil
			}
			findings = append(findings, f)
		}
		return append(findings, warning("an oddity"))
	}}
	examine := func(fix bool) (lines []string, code exit.Code) {
		findings := Examine(t.Context(), []Check{check}, fix, func(f Finding) {
			lines = append(lines, strings.Join(strings.Fields(f.String()), " "))
		})
		return lines, Code(findings)
	}

	lines, code := examine(false)
	want := []string{
		"problem leftovers one is left; it fails; do: remove one",
		"problem leftovers two is left; it fails; do: remove two",
		"warning leftovers an oddity",
	}
	if diff := cmp.Diff(want, lines); diff != "" || code != exit.Failure || len(left) != 2 {
		t.Errorf("looking: code %d, %d left\n%s", code, len(left), diff)
	}
	lines, code = examine(true)
	want = []string{
		"ok leftovers one is left; done: one removed",
		"problem leftovers two is left; the remedy has failed: it is permission denied; and held; do: remove two",
		"warning leftovers an oddity",
	}
	if diff := cmp.Diff(want, lines); diff != "" || code != exit.Permission || len(left) != 1 {
		t.Errorf("mending: code %d, %d left\n%s", code, len(left), diff)
	}
}

// TestJSON shows that every key is there, and null what there is not.
func TestJSON(t *testing.T) {
	f := Finding{Check: "module", Result: Warning, Seen: "not loaded"}
	f.Fix = func() (string, error) { return "", nil }
	got, err := json.Marshal([]Finding{f, {Check: "x", Result: OK, Seen: "<a>", Why: "w", Remedy: "r", Fixed: "f"}})
	if err != nil {
		t.Fatal(err)
	}
	const want = `[{"check":"module","result":"warning","seen":"not loaded",` +
		`"why":null,"remedy":null,"fixable":true,"fixed":null},` +
		`{"check":"x","result":"ok","seen":"\u003ca\u003e",` +
		`"why":"w","remedy":"r","fixable":false,"fixed":"f"}]`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}

// TestInterrupted shows that no check begins after an interrupt.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	stop := Check{"stop", func(context.Context) []Finding { n++; cancel(); return []Finding{ok("")} }}
	if Examine(ctx, []Check{stop, stop}, false, func(Finding) {}); n != 1 {
		t.Errorf("%d checks were made", n)
	}
}

// show adds files to those of a fake kernel.
func show(t *testing.T, k *nbdnltest.Kernel, f files) {
	t.Helper()
	for path, content := range f {
		if err := os.MkdirAll(filepath.Dir(k.Path(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(k.Path(path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestControl shows what is said of a kernel that answers, that hides its
// driver, and that is stuck in somebody's command.
func TestControl(t *testing.T) {
	hidden := nbdnltest.Options{NoModule: true, Release: "6.1.0"}
	for _, tt := range []struct {
		name    string
		options nbdnltest.Options
		stuck   bool
		want    Result
		code    exit.Code
		says    string
		needs   string // what later checks say
	}{
		{name: "answers", want: OK, code: exit.OK, says: "netlink answers"},
		{
			name: "hidden", options: hidden,
			want: Warning, code: exit.Unsupported, says: "does not show in this network namespace",
		},
		{
			name: "hidden, and no devices", options: hidden,
			want: Problem, code: exit.Unsupported, says: "as with kernels up to 6.1", needs: "the control interface",
		},
		{
			name: "stuck", stuck: true,
			want: Problem, code: exit.Failure, says: "the kernel does not answer", needs: "an answer of the kernel",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := nbdnltest.New(t, tt.options)
			m := &Machine{System: k.System()}
			show(t, k, files{"sys/module/nbd/initstate": "live\n"})
			if tt.name == "hidden" {
				show(t, k, files{"sys/block/nbd0/size": "0\n"})
			}
			if tt.stuck {
				unblock := k.Block(nbdnltest.Status)
				stuck := make(chan error)
				go func() {
					_, err := k.Client().Status(context.WithoutCancel(t.Context()), 0)
					stuck <- err
				}()
				defer func() {
					unblock()
					if err := <-stuck; err != nil {
						t.Error(err)
					}
				}()
				for k.Commands(nbdnltest.Status) == 0 {
				}
			}
			f := m.control(t.Context())[0]
			if f.Result != tt.want || f.Code != tt.code || !strings.Contains(f.Seen, tt.says) {
				t.Errorf("%v (code %d)", f, f.Code)
			}
			if held := m.held(t.Context())[0]; tt.needs != "" && held.Seen != "not looked at: needs "+tt.needs {
				t.Error(held)
			}
		})
	}
}

// TestControlNotLoaded shows that a driver that is not there is not asked.
func TestControlNotLoaded(t *testing.T) {
	examineFiles(t, "control", []fileCase{
		{"not loaded", notLoaded, "unknown control not looked at: needs the nbd module"},
	})
}

// TestHeld shows that devices which are open though not connected are named,
// and the first of many only.
func TestHeld(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	m := &Machine{System: k.System()}
	if f := m.held(t.Context()); len(f) != 1 || f[0].Result != OK {
		t.Error(f)
	}
	var pids []int
	for index := range maxHeld + 2 {
		pid, release := k.Hold(index)
		defer release()
		pids = append(pids, pid)
	}
	findings := m.held(t.Context())
	if len(findings) != maxHeld+1 || !strings.HasPrefix(findings[maxHeld].Seen, "2 more devices") {
		t.Fatal(findings)
	}
	for i, f := range findings[:maxHeld] {
		if !strings.Contains(f.Seen, fmt.Sprintf("nbd%d is open though not connected: process %d ", i, pids[i])) {
			t.Error(f)
		}
	}
}
