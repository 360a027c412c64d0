package doctor

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"strings"
)

// udevDirs are where udev(7) has its rules, the first before the others.
var udevDirs = []string{
	"etc/udev/rules.d",
	"run/udev/rules.d",
	"usr/local/lib/udev/rules.d",
	"usr/lib/udev/rules.d",
	"lib/udev/rules.d",
}

// udevControl is there while udev runs.
const udevControl = "run/udev/control"

// noWatch is a rule that keeps udev from opening a device that was written to.
const noWatch = `SUBSYSTEM=="block", KERNEL=="nbd*", OPTIONS:="nowatch"`

// udev tells what udev does with devices.
func (m *Machine) udev(context.Context) []Finding {
	if !m.exists(udevControl) {
		return []Finding{ok("no udev runs here")}
	}
	watched, by, programs := m.udevRules()
	var findings []Finding
	if watched {
		f := warning("udev watches nbd devices (%s): it opens each one again whenever a writer closes it", by)
		findings = append(findings, f.
			because("a device that is open can't be connected anew, and stays after a disconnect; "+
				"nbdctl waits for udev, other programs get EBUSY").
			do("if devices come and go often: "+
				"echo '%s' >/etc/udev/rules.d/61-nbd.rules && udevadm control --reload", noWatch))
	}
	for _, p := range programs {
		findings = append(findings, warning("a rule of udev runs a program when an nbd device changes (%s)", p).
			because("whatever has a device open keeps it from being connected or disconnected").
			do("see that this program lets go of devices at once, or remove the rule"))
	}
	switch {
	case findings != nil:
		return findings
	case by != "":
		return []Finding{ok("udev runs, and does not watch nbd devices (%s)", by)}
	}
	return []Finding{ok("udev runs, and has no rules for nbd devices")}
}

// udevRules reads the rules in their order and returns whether, according to
// the last of them that says so, devices are watched, and where that is; and
// which of them run programs for nbd devices in particular.
func (m *Machine) udevRules() (watched bool, by string, programs []string) {
	final := false
	for _, file := range m.configFiles(".rules", udevDirs...) {
		label := "" // to which a rule of this file has jumped
		for _, line := range m.configLines(file) {
			r := ruleFor(line, "nbd0")
			if label != "" && r.label != label {
				continue
			}
			label = ""
			if !r.fits {
				continue
			}
			if r.named && r.program != "" {
				programs = append(programs, fmt.Sprintf("%s: %s", file, r.program))
			}
			if r.conditional {
				continue
			}
			label = r.jump
			if r.option != "" && !final {
				watched, by, final = r.option == "watch", file, r.final
			}
		}
	}
	return watched, by, programs
}

// A rule is what a line of a rules file does with a block device that changes.
type rule struct {
	fits        bool   // unless something keeps the rule from it that is not looked at here,
	conditional bool   // and there is such a thing
	named       bool   // devices of its kind are named in the rule
	option      string // "watch" or "nowatch"
	final       bool   // and no later rule can change that
	program     string
	label, jump string
}

// ruleParts are the comparisons and assignments of a rule.
var ruleParts = regexp.MustCompile(`([A-Z_]+(?:\{[^}]*\})?)\s*(==|!=|\+=|-=|:=|=)\s*"([^"]*)"`)

// ruleFor reads a line as it applies to the device of that name.
func ruleFor(line, device string) rule {
	r := rule{fits: true}
	subjects := map[string]string{"KERNEL": device, "SUBSYSTEM": "block", "ACTION": "change"}
	for _, part := range ruleParts.FindAllStringSubmatch(line, -1) {
		key, operator, value := part[1], part[2], part[3]
		subject, looked := subjects[key]
		looked = looked || strings.HasPrefix(key, "ENV{DM_") // which only devices of device mapper have
		switch {
		case looked && (operator == "==" || operator == "!="):
			pattern, matches := matching(value, subject)
			r.fits = r.fits && matches == (operator == "==")
			r.named = r.named || key == "KERNEL" && operator == "==" && strings.HasPrefix(pattern, "nbd")
		case key == "PROGRAM", key == "IMPORT{program}":
			r.program, r.conditional = value, true
		case operator == "==", operator == "!=", strings.HasPrefix(key, "IMPORT"):
			r.conditional = true
		case key == "OPTIONS" && (value == "watch" || value == "nowatch"):
			r.option, r.final = value, operator == ":="
		case key == "RUN", key == "RUN{program}":
			r.program = value
		case key == "GOTO":
			r.jump = value
		case key == "LABEL":
			r.label = value
		}
	}
	return r
}

// matching returns which of the patterns, separated by bars, the subject matches.
func matching(patterns, subject string) (string, bool) {
	for pattern := range strings.SplitSeq(patterns, "|") {
		if matches, err := path.Match(pattern, subject); matches && err == nil {
			return pattern, true
		}
	}
	return "", false
}
