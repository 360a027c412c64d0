package claim_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/claim"
)

// Whoever looks at a device and then changes it claims it for both, so that no other program
// changes it in between.
func ExampleDir_Claim() {
	dir, err := os.MkdirTemp("", "claims")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c, err := claim.Dir(dir).Claim(ctx, 3)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("nbd3 is ours for a moment")
	if err := c.Release(); err != nil {
		log.Fatal(err)
	}
	// Output: nbd3 is ours for a moment
}

// A program leases the index of a device that it serves. If it is killed, the next one learns whose
// device is left there.
func ExampleDir_TryLease() {
	tmp, err := os.MkdirTemp("", "leases")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	dir := claim.Dir(tmp)
	lease, err := dir.TryLease(3)
	if err != nil {
		log.Fatal(err)
	}
	if err := lease.Note("example:1"); err != nil {
		log.Fatal(err)
	}
	_, err = dir.TryLease(3)
	fmt.Println("taken:", errors.Is(err, claim.ErrBusy))
	if err := lease.Leave(); err != nil { // as if it were killed
		log.Fatal(err)
	}
	left, err := dir.LeftAt(3)
	fmt.Println("left:", left, err)
	// Output:
	// taken: true
	// left: example:1 <nil>
}
