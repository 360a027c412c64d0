package nbdnl

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl/internal/devices"
)

func TestChanges(t *testing.T) {
	const index = 3
	use := func(incarnation Incarnation, change func(*Status)) sight {
		s := sight{
			exists: true,
			use:    devices.Use{Connected: true, Incarnation: incarnation},
			status: Status{Index: index, State: StateLive, Size: 4096, BlockSize: 512},
		}
		if change != nil {
			change(&s.status)
		}
		return s
	}
	live := use(1, nil)
	resizedBlocks := use(1, func(s *Status) { s.Size, s.BlockSize = 8192, 4096 })
	connecting := use(1, func(s *Status) { s.State, s.Size = StateConnecting, 0 })
	tests := []struct {
		name          string
		before, after sight
		dead          bool
		want          []EventKind
	}{
		{"nothing", live, live, false, nil},
		{"no device", none(index), none(index), true, nil},
		{"a new device", none(index), idle(index), false, []EventKind{EventAdd}},
		{"a new device in use", none(index), live, false, []EventKind{EventAdd, EventConnect}},
		{"connect", idle(index), live, false, []EventKind{EventConnect}},
		{"connect and death", idle(index), live, true, []EventKind{EventConnect, EventLinkDead}},
		{"death", live, live, true, []EventKind{EventLinkDead}},
		{"death and end", live, idle(index), true, []EventKind{EventLinkDead, EventDisconnect}},
		{"death of one that came and went", idle(index), idle(index), true, nil},
		{"end", live, idle(index), false, []EventKind{EventDisconnect}},
		{"used anew", live, use(2, nil), false, []EventKind{EventDisconnect, EventConnect}},
		{"used anew after a death", live, use(2, nil), true, []EventKind{EventLinkDead, EventDisconnect, EventConnect}},
		{"resize", live, use(1, func(s *Status) { s.Size = 8192 }), false, []EventKind{EventResize}},
		{"read-only", live, use(1, func(s *Status) { s.ReadOnly = true }), false, []EventKind{EventState}},
		{"flags", live, use(1, func(s *Status) { s.Flags = FlagSendTrim }), false, []EventKind{EventState}},
		{"size and block size", live, resizedBlocks, false, []EventKind{EventResize, EventState}},
		{"without a size", live, connecting, false, []EventKind{EventState}},
		{"another owner by now", live, use(1, func(s *Status) { s.OwnerGone = true }), false, nil},
		{"removed in use", live, none(index), false, []EventKind{EventDisconnect, EventRemove}},
		{"removed", idle(index), none(index), false, []EventKind{EventRemove}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []EventKind
			for _, e := range changes(tt.before, tt.after, tt.dead) {
				got = append(got, e.Kind)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("events are %v, want %v", got, tt.want)
			}
		})
	}
}

// Whatever has happened, each event begins where the one before it ended.
func TestChangesAreChained(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	anything := func() sight {
		s := idle(5)
		switch random.IntN(4) {
		case 0:
			return none(5)
		case 1:
			return s
		}
		s.use = devices.Use{Connected: true, Incarnation: Incarnation(random.Uint64N(3))}
		s.status.State = StateLive
		s.status.Size = random.Int64N(3) * 4096
		s.status.ReadOnly = random.IntN(2) == 0
		return s
	}
	for range 10_000 {
		before, after := anything(), anything()
		at := before.status
		events := changes(before, after, random.IntN(2) == 0)
		for _, e := range events {
			if e.Previous != at {
				t.Fatalf("from %+v to %+v: %+v does not follow %+v", before, after, e, at)
			}
			at = e.Status
		}
		if at != after.status {
			t.Fatalf("from %+v to %+v: the events %+v end at %+v", before, after, events, at)
		}
	}
}
