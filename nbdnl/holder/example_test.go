package holder_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl/holder"
)

// One look at all processes tells who uses any of several devices.
func ExampleFindAll() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	holders, err := holder.FindAll(ctx, 0, 1, 2)
	if err != nil {
		log.Print(err) // A device that is not there; the others are in the map.
	}
	for index, users := range holders {
		fmt.Println(index, users)
	}
}

// A holder says for people what it is.
func ExampleHolder_String() {
	fmt.Println(holder.Holder{Kind: holder.Mount, Path: "/srv", Device: "nbd3p1"})
	fmt.Println(holder.Holder{Kind: holder.Process, PID: 42, Comm: "dd", Device: "nbd3"})
	// Output:
	// mount of nbd3p1 at /srv
	// process 42 (dd) with nbd3 open
}
