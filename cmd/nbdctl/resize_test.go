package main

import (
	"errors"
	"math"
	"testing"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

// TestSizeArgument holds what a device's new size is, also at the ends of the range.
func TestSizeArgument(t *testing.T) {
	for _, tt := range []struct {
		arg  string
		was  int64
		want int64
		err  error
	}{
		{"2M", 1 << 20, 2 << 20, nil},
		{"+1M", 1 << 20, 2 << 20, nil},
		{"-512k", 1 << 20, 1 << 19, nil},
		{"-2M", 1 << 20, -1 << 20, nil},
		{"-9223372036854775807", 512, 512 - math.MaxInt64, nil},
		{"+9223372036854774784", 512, math.MaxInt64 - 511, nil},
		{"+9223372036854775807", 512, 0, quantity.ErrTooLarge},
		{"+7E", 1 << 60, 0, quantity.ErrTooLarge},
	} {
		parse, err := sizeArgument("nbd3", tt.arg)
		if err != nil {
			t.Errorf("%s: %v", tt.arg, err)
			continue
		}
		if got, err := parse(tt.was); got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%d %s: %d, %v; want %d, %v", tt.was, tt.arg, got, err, tt.want, tt.err)
		}
	}
}
