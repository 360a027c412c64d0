package doctor

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestUdevRules shows which of udev's rules concern devices.
func TestUdevRules(t *testing.T) {
	const running, block = "run/udev/control", "usr/lib/udev/rules.d/60-block.rules"
	watch := files{
		running: "",
		block: `# all disks
ACTION!="remove", SUBSYSTEM=="block", \
  KERNEL=="loop*|sd*|nbd*", \
  OPTIONS+="watch"
`,
		// It jumps over the rest of the file, as libdm's does.
		"usr/lib/udev/rules.d/55-dm.rules": `KERNEL!="dm-[0-9]*", GOTO="dm_end"
OPTIONS:="nowatch"
LABEL="dm_end"
`,
	}
	rules := func(name, content string) files {
		return watch.with(files{"etc/udev/rules.d/" + name: content})
	}
	for _, tt := range []struct {
		name  string
		files files
		want  Result
		says  []string // in the findings, one each
	}{
		{"no udev", watch.with(files{running: "-"}), OK, []string{"no udev runs here"}},
		{"no rules", files{running: ""}, OK, []string{"has no rules for nbd devices"}},
		{"as distributed", watch, Warning, []string{"watches nbd devices (/" + block + ")"}},
		{
			"a later rule", rules("61-nbd.rules", noWatch),
			OK, []string{"does not watch nbd devices (/etc/udev/rules.d/61-nbd.rules)"},
		},
		{
			"an earlier one that is final", rules("10-nbd.rules", noWatch),
			OK, []string{"(/etc/udev/rules.d/10-nbd.rules)"},
		},
		{
			"an earlier one that is not", rules("10-nbd.rules", `KERNEL=="nbd*", OPTIONS="nowatch"`),
			Warning, []string{"60-block.rules"},
		},
		{
			"of other devices", rules("61-nbd.rules", `KERNEL=="sd*", OPTIONS:="nowatch"`),
			Warning, []string{"60-block.rules"},
		},
		{
			"of other actions", rules("61-nbd.rules", `ACTION=="add", KERNEL=="nbd*", OPTIONS:="nowatch"`),
			Warning, []string{"60-block.rules"},
		},
		{
			"on a condition", rules("61-nbd.rules", `KERNEL=="nbd*", ENV{QUIET}=="1", OPTIONS:="nowatch"`),
			Warning, []string{"60-block.rules"},
		},
		{"switched off", rules("60-block.rules", ""), OK, []string{"has no rules"}},
		{
			"a program", rules("99-mine.rules", `KERNEL=="nbd*", RUN+="/usr/local/bin/automount %k"`), Warning,
			[]string{"60-block.rules", "/etc/udev/rules.d/99-mine.rules: /usr/local/bin/automount %k"},
		},
		{
			"a program for all disks", rules("99-mine.rules", `SUBSYSTEM=="block", RUN+="/bin/true"`),
			Warning, []string{"60-block.rules"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			findings := healthy.with(tt.files).machine(t).udev(t.Context())
			if len(findings) != len(tt.says) {
				t.Fatalf("%v", findings)
			}
			for i, f := range findings {
				if f.Result != tt.want || !strings.Contains(f.Seen, tt.says[i]) {
					t.Errorf("%v, want %s and %q", f, tt.want, tt.says[i])
				}
			}
		})
	}
}

func TestRule(t *testing.T) {
	for line, want := range map[string]rule{
		`KERNEL=="nbd[0-9]*", OPTIONS+="watch"`:                {fits: true, named: true, option: "watch"},
		`KERNEL!="nbd*", GOTO="end"`:                           {jump: "end"},
		`LABEL="end"`:                                          {fits: true, label: "end"},
		`ENV{DM_NAME}!="?*", GOTO="end"`:                       {fits: true, jump: "end"},
		`SUBSYSTEM=="block", PROGRAM=="/bin/x", SYMLINK+="x"`:  {fits: true, conditional: true, program: "/bin/x"},
		`ACTION=="remove", KERNEL=="nbd*", RUN{program}+="/y"`: {named: true, program: "/y"},
		`IMPORT{builtin}="blkid"`:                              {fits: true, conditional: true},
	} {
		if diff := cmp.Diff(want, ruleFor(line, "nbd0"), cmp.AllowUnexported(rule{})); diff != "" {
			t.Errorf("%s:\n%s", line, diff)
		}
	}
}
