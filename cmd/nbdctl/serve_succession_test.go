package main

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestSuccessionFormat holds that what servers tell each other is what was written when the form
// was made, and that it is read whole (testdata/succession.json).
func TestSuccessionFormat(t *testing.T) {
	content, err := os.ReadFile("testdata/succession.json")
	if err != nil {
		t.Fatal(err)
	}
	var told struct {
		Form   int        `json:"form"`
		Legacy legacy     `json:"legacy"`
		Client heldClient `json:"client"`
		Words  []word     `json:"words"`
	}
	if err := json.Unmarshal(content, &told); err != nil {
		t.Fatal(err)
	}
	var old, now any
	b, err := json.Marshal(told)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(content, &old); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &now); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(old, now); diff != "" {
		t.Errorf("it is written as another (-old +new):\n%s", diff)
	}
	if told.Form != successionForm {
		t.Errorf("the form is %d now: testdata/succession.json is of another, and has to be refused", successionForm)
	}
	l := told.Legacy
	if len(l.Exports) != 2 || len(l.Descriptors) != 2 || l.Exports[0].Definition.Spec.Arg != "/srv/disk.img" ||
		l.Exports[1].Stats.Read.Requests != 7 || !l.Exports[0].Fixed || l.Offer.Default != "disk" {
		t.Errorf("it is read as %+v", l)
	}
	if c := told.Client; c.Agreement.Size != 1<<20 || string(c.Unread) != "half a request" || c.Export != 1 {
		t.Errorf("the client is read as %+v", c)
	}
	if err := unknownForm(2); !strings.Contains(err.Error(), "in form 2, and this nbdctl knows form 1") {
		t.Error(err)
	}
}
