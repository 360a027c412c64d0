package names_test

import (
	"errors"
	"os"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/internal/names"
)

func FuzzIndex(f *testing.F) {
	for _, s := range []string{"nbd3", "nbd3p1", "sda", "nbd", "nbd007", "nbd99999999999", "3", "/dev/nbd3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		index, ok := names.Index(s)
		if ok != (index >= 0 && index <= names.Max && names.Device(index) == s) {
			t.Errorf("%q is %d, %t", s, index, ok)
		}
	})
}

func TestCheck(t *testing.T) {
	for index, valid := range map[int]bool{-1: false, 0: true, names.Max: true, names.Max + 1: false} {
		if err := names.Check(index); (err == nil) != valid || err != nil && !errors.Is(err, os.ErrInvalid) {
			t.Errorf("%d: %v", index, err)
		}
	}
}
