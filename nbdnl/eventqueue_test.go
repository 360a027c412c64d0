package nbdnl

import (
	"maps"
	"slices"
	"testing"
)

// TestEventQueue holds what is queued until it is taken, and how much of it.
func TestEventQueue(t *testing.T) {
	q := newEventQueue()
	q.change(3, false)
	q.change(3, false)
	q.change(1, true)
	q.death(7)
	if len(q.wake) != 1 {
		t.Error("nobody is woken")
	}
	e := q.take()
	changed, dead := slices.Sorted(maps.Keys(e.changed)), slices.Sorted(maps.Keys(e.dead))
	if !slices.Equal(changed, []int{1, 3}) || !slices.Equal(dead, []int{7}) || !e.added || e.all {
		t.Errorf("took %+v", e)
	}
	if e := q.take(); len(e.changed)+len(e.dead) > 0 || e.added || e.all {
		t.Errorf("took %+v of an empty queue", e)
	}
	for index := range 1024 {
		q.change(index, false)
	}
	if e := q.queued; e.all || len(e.changed) != 1024 {
		t.Errorf("%d changes are queued, all %t", len(e.changed), e.all)
	}
	q.change(1024, false)
	if !q.queued.all {
		t.Error("more changes are queued one by one")
	}
	q.change(5, false)
	q.death(7)
	if e := q.take(); !e.all || len(e.changed) > 0 || len(e.dead) != 1 {
		t.Errorf("took %d changes, all %t, %d deaths", len(e.changed), e.all, len(e.dead))
	}
}
