package host

import (
	"encoding/json"
	"os"
	"path/filepath"
)

// keeperFile is the name of the file that a keeper has locked, in the directory of its device.
const keeperFile = "keeper"

// A Keeper is what a keeper tells of itself.
type Keeper struct {
	PID int `json:"pid"`
	// Unit is that of systemd, which starts it again; "": it is in none.
	Unit string `json:"unit,omitempty"`
}

// readKeeper returns the keeper that is alive; nil: there is none.
func readKeeper(dir string) *Keeper {
	path := filepath.Join(dir, keeperFile)
	if alive, err := lockHeld(path); err != nil || !alive {
		return nil
	}
	b, err := os.ReadFile(path)
	var k Keeper
	if err != nil || json.Unmarshal(b, &k) != nil {
		return nil // It has gone meanwhile.
	}
	return &k
}
