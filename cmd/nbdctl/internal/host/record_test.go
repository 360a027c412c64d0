package host

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// TestRecordIncarnation holds that a record says of an incarnation what it has always said, a
// number under "birth", also one that no float has, so that older and newer programs read each
// other's.
func TestRecordIncarnation(t *testing.T) {
	for _, want := range []nbdnl.Incarnation{0, 1, 77<<32 | 4242, math.MaxUint64} {
		b, err := json.Marshal(Record{Version: recordVersion, Incarnation: want})
		if err != nil {
			t.Fatal(err)
		}
		var old struct {
			Birth uint64 `json:"birth,omitempty"`
		}
		if err := json.Unmarshal(b, &old); err != nil || old.Birth != uint64(want) {
			t.Errorf("an older program reads %d of %d, error %v", old.Birth, want, err)
		}
		if has := strings.Contains(string(b), `"birth"`); has != (want != 0) {
			t.Errorf("%d is written: %t", want, has)
		}
	}
	uuid := "5e2b1c3a-0000-4000-8000-000000000001"
	dir := filepath.Join(t.TempDir(), uuid)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// What the versions before nbdnl.Incarnation wrote.
	old := `{"version":1,"uuid":"` + uuid + `","identifier":"nbdctl:` + uuid + `",` +
		`"phase":"live","pid":12,"index":0,"birth":9223372036854775811,` +
		`"mode":"ioctl","since":"2026-11-01T10:00:00Z","serving":1,"size":1048576,"block_size":512,` +
		`"log":"journal","spec":{"kind":"memory"}}`
	if err := os.WriteFile(filepath.Join(dir, "state.json"), []byte(old), 0o644); err != nil {
		t.Fatal(err)
	}
	if r, err := readRecord(dir); err != nil || r.Incarnation != 9223372036854775811 || *r.Index != 0 {
		t.Errorf("an older program's record is %+v, error %v", r, err)
	}
}
