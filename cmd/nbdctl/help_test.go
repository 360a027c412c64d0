package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// TestHelpIsAName holds that no command takes an argument for a request for help:
// where a device is named, "help" is a device.
func TestHelpIsAName(t *testing.T) {
	t.Setenv("NBDCTL_STATE_DIR", filepath.Join(t.TempDir(), "state"))
	for _, tt := range []struct {
		line string
		code exit.Code
		says string
	}{
		{"status ?", exit.NotFound, "there is no device ?"},
		{"status -- ?", exit.NotFound, "there is no device ?"},
		{"status --json ?", exit.NotFound, "there is no device ?"},
		{"stats ?", exit.NotFound, "there is no device ?"},
		{"kick ?", exit.NotFound, "there is no device ?"},
		{"disconnect ?", exit.NotFound, "there is no device ?"},
		{"disconnect --force ?", exit.NotFound, "there is no device ?"},
		{"disconnect ? nbd99", exit.NotFound, "there is no device ?"},
		{"resize ? 2M", exit.NotFound, "there is no device ?"},
		{"reconfigure ? --timeout 5s", exit.NotFound, "there is no device ?"},
		{"kick ? x", exit.Usage, "kick takes one device"},
		{"disconnect --all ?", exit.Usage, "either devices"},
		{"connect ?", exit.Usage, `unknown backend "?"`},
		{"serve ?", exit.Usage, `unknown backend "?"`},
		{"list ?", exit.Usage, `list takes no argument, got "?"`},
		{"watch ?", exit.Usage, `watch takes no argument, got "?"`},
		{"doctor ?", exit.Usage, `doctor takes no argument, got "?"`},
		{host.Command + " ?", exit.Failure, "not for use by hand"},
	} {
		for _, word := range []string{"help", "h"} {
			line := strings.ReplaceAll(tt.line, "?", word)
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), strings.Fields(line), &stdout, &stderr)
			says := strings.ReplaceAll(tt.says, "?", word)
			if code != tt.code || stdout.Len() != 0 || !strings.Contains(stderr.String(), says) {
				t.Errorf("%s: exit code %d, want %d; stdout %q; stderr %q, want %q",
					line, code, tt.code, &stdout, &stderr, says)
			}
		}
	}
}

// TestHelpForOne holds that help is asked for by a flag anywhere on the line, and
// that what there is no help for is an error.
func TestHelpForOne(t *testing.T) {
	const usage = "nbdctl disconnect [command options] DEVICE..."
	for _, line := range []string{
		"help disconnect", "h disconnect", "--help disconnect", "disconnect -h", "disconnect --help=true",
		"disconnect nbd0 --help", "disconnect --force nbd0 --help", "disconnect --help nbd0", "disconnect --help help",
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(line), &stdout, &stderr)
		if code != exit.OK || !strings.Contains(stdout.String(), usage) || stderr.Len() != 0 {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", line, code, &stdout, &stderr)
		}
	}
	for _, line := range []string{
		"help nonsense", "--help nonsense", "nonsense --help", "help " + host.Command, "help connect x",
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(line), &stdout, &stderr)
		if code != exit.Usage || stdout.Len() != 0 || stderr.Len() == 0 {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", line, code, &stdout, &stderr)
		}
	}
}
