package kind

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/host"
)

// errRefused is what the kind safe says to every secret.
var errRefused = errors.New("refused")

// safe has a secret option beside another, for the test.
func safe(t *testing.T) {
	all := All
	t.Cleanup(func() { All = all })
	All = append(all[:len(all):len(all)], Kind{
		Name: "safe", Options: []string{"size", "pin", "puk"}, Secrets: []string{"pin", "puk"},
		Check: func(host.Spec) error { return nil },
		Open: func(_ context.Context, s host.Spec, _ bool) (*host.Backing, error) {
			return nil, fmt.Errorf("safe: %s: %w", s.Secrets["pin"].Reveal(), errRefused)
		},
	})
}

// TestSecrets holds that a secret option is given by a reference, the last of which counts, and
// that neither what is written down of a spec nor an error has the value.
func TestSecrets(t *testing.T) {
	safe(t)
	dir := t.TempDir()
	t.Chdir(dir)
	for name, content := range map[string]string{"first": "0815\n", "second": "4711\n"} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spec := host.Spec{Kind: "safe", Options: []string{"pin=file:first", "size=4711", "pin=file:second"}}
	if err := Check(spec); err != nil {
		t.Fatal(err)
	}
	s, err := ReadSecrets(spec)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"pin=file:first", "size=4711", "pin=file:" + filepath.Join(dir, "second")}
	if diff := cmp.Diff(want, s.Options); diff != "" || spec.Options[2] != "pin=file:second" {
		t.Errorf("the options are:\n%s", diff)
	}
	if len(s.Secrets) != 1 || s.Secrets["pin"].Reveal() != "4711" {
		t.Errorf("the secrets are %v", s.Secrets)
	}
	_, err = Open(t.Context(), s)
	if !errors.Is(err, errRefused) || err.Error() != "safe: ***: refused" {
		t.Error(err)
	}
	s.Options = nil
	written, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(written), fmt.Sprintf("%+v %#v", s, s)} {
		if strings.Contains(text, "4711") {
			t.Errorf("it is written down: %s", text)
		}
	}
}

// TestSecretsRefused holds what is no reference, on any machine, and what is none here.
func TestSecretsRefused(t *testing.T) {
	safe(t)
	for _, tt := range []struct {
		options []string
		says    string
	}{
		{[]string{"pin=4711"}, "-o pin: is secret"},
		{[]string{"pin="}, "-o pin: is secret"},
		{[]string{"pin=4711", "pin=fd:3"}, "-o pin: is secret"},
		{[]string{"pim=4711"}, `-o pim=***: safe has no option "pim", only size, pin, puk`},
		{[]string{"pin"}, "must be key=value"},
	} {
		err := Check(host.Spec{Kind: "safe", Options: tt.options})
		if exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), tt.says) ||
			strings.Contains(err.Error(), "4711") {
			t.Errorf("%q: code %d, %v; want %q", tt.options, exit.Of(err), err, tt.says)
		}
	}
	_, err := ReadSecrets(host.Spec{Kind: "safe", Options: []string{"puk=file:/nowhere"}})
	if !errors.Is(err, os.ErrNotExist) || !strings.HasPrefix(err.Error(), "-o puk: ") {
		t.Error(err)
	}
	plain := host.Spec{Kind: "memory", Options: []string{"limit=1G"}, Size: 1}
	if s, err := ReadSecrets(plain); err != nil || s.Secrets != nil {
		t.Errorf("of a kind without secrets: %v, %v", s.Secrets, err)
	}
}
