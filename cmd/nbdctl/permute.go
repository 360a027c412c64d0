package main

import (
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
)

// permute moves the flags of a command before its arguments, so that
// "connect memory --size 1M" means the same as "connect --size 1M memory": the
// flag package stops at the first argument. What follows "--" stays an argument.
//
// A line with --help becomes one of the help command: the library takes what else
// is on the line for the name of a command to explain, and says nothing, with code
// 0, if there is none. One with --version before any command becomes one of the version command.
func permute(app *cli.App, args []string) []string {
	at := slices.IndexFunc(args, func(a string) bool { return !strings.HasPrefix(a, "-") })
	before := args[:max(at, 0)]
	if at < 0 {
		before = args
	}
	switch {
	case at >= 0 && slices.ContainsFunc(before, asksForHelp):
		return slices.Concat([]string{"help"}, args[at:])
	case slices.ContainsFunc(before, asksForVersion) && !slices.ContainsFunc(before, asksForHelp):
		return slices.Concat([]string{"version"}, slices.DeleteFunc(slices.Clone(before), asksForVersion))
	case at < 0:
		return args
	}
	command := app.Command(args[at])
	if command == nil {
		return args
	}
	var flags, rest []string
	for i := at + 1; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			rest = append(rest, args[i+1:]...)
			break
		}
		if len(arg) < 2 || arg[0] != '-' || arg[1] >= '0' && arg[1] <= '9' { // -512M is a size
			rest = append(rest, arg)
			continue
		}
		if asksForHelp(arg) {
			return []string{"help", command.Name}
		}
		flags = append(flags, arg)
		if takesValue(command, arg) {
			if i++; i == len(args) {
				// The value is missing: the parser says so if nothing follows.
				return slices.Concat(args[:at+1], flags)
			}
			flags = append(flags, args[i])
		}
	}
	// With "--" the parser takes an argument that looks like a flag for what
	// it is.
	return slices.Concat(args[:at+1], flags, []string{"--"}, rest)
}

// asksForHelp tells whether arg is the flag --help, in any of its spellings.
func asksForHelp(arg string) bool { return switchesOn(arg, "h", "help") }

// asksForVersion tells whether arg is the flag --version.
func asksForVersion(arg string) bool { return switchesOn(arg, "v", "version") }

// switchesOn tells whether arg is one of the flags called names, in any of their spellings.
func switchesOn(arg string, names ...string) bool {
	flag, value, valued := strings.Cut(arg, "=")
	on, _ := strconv.ParseBool(value)
	name := strings.TrimPrefix(strings.TrimPrefix(flag, "-"), "-")
	return name != flag && (on || !valued) && slices.Contains(names, name)
}

// takesValue tells whether the value of the flag arg is the next argument.
func takesValue(command *cli.Command, arg string) bool {
	name := strings.TrimLeft(arg, "-")
	if strings.Contains(name, "=") {
		return false
	}
	for _, f := range command.Flags {
		if slices.Contains(f.Names(), name) {
			_, isBool := f.(*cli.BoolFlag)
			return !isBool
		}
	}
	return false
}
