package claim_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

func TestClaim(t *testing.T) {
	s := claim.Dir(filepath.Join(t.TempDir(), "state"))
	first, err := s.Claim(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(string(s), "claims/nbd3")
	if _, err := os.Stat(path); err != nil {
		t.Errorf("no file of the claim: %v", err)
	}
	other, err := s.Claim(t.Context(), 4)
	if err != nil {
		t.Fatalf("claim of another index: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Claim(ctx, 3); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second claim: %v", err)
	}
	if _, err := s.TryClaim(3); !errors.Is(err, claim.ErrBusy) {
		t.Errorf("second claim, not waiting: %v", err)
	}
	const waiting = 8
	claimed := make(chan *claim.Claim, waiting)
	for range waiting {
		go func() {
			c, err := s.Claim(t.Context(), 3)
			if err != nil {
				t.Error(err)
			}
			claimed <- c
		}()
	}
	for c, n := first, 0; ; c, n = <-claimed, n+1 {
		select {
		case <-claimed:
			t.Fatal("two have claimed the index at a time")
		case <-time.After(5 * time.Millisecond):
		}
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
		if n == waiting {
			break
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file outlives the claim: %v", err)
	}
	if err := other.Release(); err != nil {
		t.Error(err)
	}
	if _, err := s.Claim(t.Context(), -1); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("claim of no index: %v", err)
	}
}
