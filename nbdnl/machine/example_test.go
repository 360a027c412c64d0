package machine_test

import (
	"fmt"

	"github.com/nbdctl/nbdctl/nbdnl/machine"
)

// A program avoids what only some kernels do well. Of one whose version it can't read it expects
// nothing.
func ExampleRelease_Before() {
	r := machine.ParseRelease("6.12.107-amd64")
	fmt.Println(r.Known(), r.Before(6, 2, 0), r.Before(7, 2, 0))
	// Output: true false true
}
