//go:build !race

package file

import "testing"

// TestDirectAllocatesNothing is not for the race detector, with which pools forget.
func TestDirectAllocatesNothing(t *testing.T) {
	d := newDirect(512, 512)
	disk := func(p []byte, off int64) (int, error) { return len(p), nil }
	for name, p := range map[string][]byte{
		"memory that suits": alignedMemory(4096, 512),
		"other memory":      askew(300 << 10 / 512 * 512),
	} {
		n := testing.AllocsPerRun(1000, func() {
			if n, err := d.read(p, 0, disk); n != len(p) || err != nil {
				t.Fatal(n, err)
			}
			if n, err := d.write(p, 0, disk); n != len(p) || err != nil {
				t.Fatal(n, err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations for each request", name, n)
		}
	}
}
