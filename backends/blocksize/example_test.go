package blocksize_test

import (
	"fmt"
	"log"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/blocksize"
)

// A disk of large blocks takes requests of small ones.
func Example() {
	large := newDisk(1<<20, backends.BlockSizes{Minimum: 32 << 10}, all)
	if _, err := large.WriteAt([]byte("hello"), 1000); err != nil {
		fmt.Println(err)
	}
	large.wrong = nil

	small, err := blocksize.New(large, 1)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := small.WriteAt([]byte("hello"), 1000); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 3)
	if _, err := small.ReadAt(p, 1002); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output:
	// write of 5 bytes at 1000 of 1048576
	// llo
}
