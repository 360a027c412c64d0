package file_test

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/nbdctl/nbdctl/backends/file"
)

// An image is made, written and made durable. It is locked meanwhile.
func ExampleOpen() {
	dir, err := os.MkdirTemp("", "images")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.img")

	// Create makes a sparse file. One that is there already is left as it is, and must have this
	// size.
	disk, err := file.Open(path, file.Options{Create: true, Size: 1 << 30})
	if err != nil {
		log.Print(err)
		return
	}
	fmt.Println(disk.Size(), "bytes, created:", disk.Created())

	// A server would do that for its clients.
	if _, err := disk.WriteAt([]byte("content"), 1<<20); err != nil {
		log.Print(err)
	}
	if err := disk.Sync(); err != nil { // An error stays: see "Errors of Sync".
		log.Print(err)
	}

	// Two writers would ruin each other's file systems.
	_, err = file.Open(path, file.Options{})
	var locked *file.LockedError
	if errors.As(err, &locked) {
		fmt.Println("nobody else can open it for writing")
	}

	// Close does not sync; whoever is served by a device closes that first, which does.
	if err := disk.Close(); err != nil {
		log.Print(err)
	}
	// Output:
	// 1073741824 bytes, created: true
	// nobody else can open it for writing
}
