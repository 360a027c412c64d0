package blockdev

import (
	"context"
	"errors"
	"testing"
)

// TestGoCounts holds that the last word counts if it has come, also when nobody waits for it any
// more, and that nothing else does.
func TestGoCounts(t *testing.T) {
	for range 100 {
		ours, theirs := passage(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		there, l := newLines(ours), newLines(theirs)
		if err := l.expectGo(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("nothing was said, and it says %v", err)
		}
		if err := there.say(line{Go: true}); err != nil {
			t.Fatal(err)
		}
		if err := l.expectGo(ctx); err != nil {
			t.Fatalf("go was said, and it says %v", err)
		}
		if err := there.say(line{Error: "no"}); err != nil {
			t.Fatal(err)
		}
		if err := l.expectGo(ctx); err == nil {
			t.Fatal("an error is taken for go")
		}
	}
}
