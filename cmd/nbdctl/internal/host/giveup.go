package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/quantity"
)

// endingPatience bounds what the kernel may take to end a device that is given up.
const endingPatience = 30 * time.Second

// A GaveUp says why nobody serves a device any more.
type GaveUp struct {
	Time   time.Time `json:"time"`
	Reason string    `json:"reason"`
}

// giveUp ends a device whose process has died too often, so that what waits for it fails at once.
// One that the kernel has connected to a server itself goes on, and waits for nobody. The record
// stays in dir: lists show why. The caller holds the lock of that, and none of the device's sockets
// is open any more.
func (r *Record) giveUp(ctx context.Context, log *slog.Logger, store *Store, dir string) {
	reason := fmt.Sprintf("the process that serves it has died %d times within %s",
		r.Spec.Restart+1, quantity.FormatSeconds(restartWindow))
	log.Error("it is not served any more", "reason", reason)
	r.GaveUp = &GaveUp{Time: time.Now().UTC().Truncate(time.Millisecond), Reason: reason}
	if err := r.write(dir); err != nil {
		log.Error("lists do not show why", "error", err)
	}
	if r.Remote != nil && r.Remote.Way == Direct {
		return
	}
	if err := r.end(ctx, store); err != nil {
		log.Warn("the device has not ended in order", "reason", err)
	}
}

// end has the kernel end the device, which nobody serves, also if it is in use.
func (r *Record) end(ctx context.Context, store *Store) error {
	if r.Index == nil {
		return nil
	}
	client, err := r.Spec.system(store).NewClient()
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, endingPatience)
	defer cancel()
	if claimed, err := client.Claims().Claim(ctx, *r.Index); err == nil {
		defer claimed.Release()
	} // Otherwise the identifier keeps devices apart.
	st, err := client.Status(ctx, *r.Index)
	if err != nil || !st.Connected() {
		return err
	}
	// Nothing is written before: that would wait for the process that is not to come.
	if st.HasIdentifier {
		return client.Drop(ctx, *r.Index, r.Identifier)
	}
	if r.Incarnation == 0 || r.Spec.system(store).IncarnationOf(*r.Index) != r.Incarnation {
		return fmt.Errorf("%s may be another device by now", r.Device())
	}
	return client.DropAny(ctx, *r.Index)
}

// forgetEnded removes what tells of devices with that index which have ended (GaveUp).
func (s *Store) forgetEnded(index int) error {
	entries, _ := s.Entries() // What can't be read tells nothing.
	var errs []error
	for _, e := range entries {
		if e.GaveUp != nil && e.Index != nil && *e.Index == index {
			errs = append(errs, s.sweep(e.dir, func(Entry) bool { return false }))
		}
	}
	return errors.Join(errs...)
}
