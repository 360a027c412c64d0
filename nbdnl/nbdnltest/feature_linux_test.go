package nbdnltest

import (
	"errors"
	"testing"
)

// TestFeatureExpected holds what a list of versions says of a kernel after all of them, or before.
func TestFeatureExpected(t *testing.T) {
	never := version{1 << 20, 0}
	no := func() bool { return false }
	for _, tt := range []struct {
		name string
		f    *Feature
		want bool
	}{
		{"in no kernel", &Feature{}, false},
		{"from the first on", &Feature{changes: []version{{}}}, true},
		{"gone", &Feature{changes: []version{{}, {0, 1}}}, false},
		{"back again", &Feature{changes: []version{{}, {0, 1}, {0, 2}}}, true},
		{"going in a later one", &Feature{changes: []version{{}, never}}, true},
		{"in a later one", &Feature{changes: []version{never}}, false},
		{"not built", &Feature{changes: []version{{}}, config: no}, false},
	} {
		if got, err := tt.f.expected(); got != tt.want || err != nil {
			t.Errorf("%s: %t, %v, want %t", tt.name, got, err, tt.want)
		}
	}
}

func TestVersionBefore(t *testing.T) {
	ascending := []version{{5, 10}, {6, 1}, {6, 12}, {7, 2}}
	for i, v := range ascending {
		for j, w := range ascending {
			if v.before(w) != (i < j) {
				t.Errorf("%v before %v: %t", v, w, v.before(w))
			}
		}
	}
}

// TestFeatureIn holds that a feature is tried out once, that in the lab a test fails where its
// kernel is not as expected, and that Need skips where the feature is missing.
func TestFeatureIn(t *testing.T) {
	always := []version{{}}
	for _, tt := range []struct {
		name            string
		required        string
		changes         []version
		has             bool
		err             error
		failed, skipped bool
	}{
		{name: "there", required: "1", changes: always, has: true},
		{name: "missing, in the lab", required: "1", changes: always, failed: true, skipped: true},
		{name: "missing, elsewhere", changes: always, skipped: true},
		{name: "there too early, in the lab", required: "1", has: true, failed: true},
		{name: "not there yet", required: "1", skipped: true},
		{name: "not to be tried out", err: errors.New("no privilege"), failed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv(requireEnv, tt.required)
			tried := 0
			f := Feature{name: tt.name, changes: tt.changes, probe: func() (bool, error) {
				tried++
				return tt.has, tt.err
			}}
			for range 2 {
				failed, skipped := record(t, func(tb testing.TB) { f.Need(tb) })
				if failed != tt.failed || skipped != tt.skipped {
					t.Errorf("failed %t, skipped %t", failed, skipped)
				}
			}
			if tried != 1 {
				t.Errorf("it was tried out %d times", tried)
			}
		})
	}
}
