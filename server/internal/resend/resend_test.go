package resend_test

import (
	"slices"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/resend"
)

const s = time.Second

// patience is that of a device with a timeout of 3 s and a dead timeout of 10 s.
var patience = resend.Patience{Resend: 3 * s, Total: 20 * s}

func key(off uint64) resend.Key { return resend.Key{Op: 0, Offset: off, Length: 4096} }

func request(off uint64, arrived, first time.Duration) resend.Request {
	return resend.Request{Key: key(off), Arrived: arrived, First: first}
}

// TestJudge holds what is taken for a repetition, of what, and when no longer.
func TestJudge(t *testing.T) {
	type arrival struct {
		now   time.Duration
		key   resend.Key
		first time.Duration
	}
	long := key(0)
	long.Length = 8192
	write := key(0)
	write.Op = 1
	first := []resend.Request{request(0, 97*s, 97*s)}
	repeated := []resend.Request{request(0, 97*s, 91*s)}
	two := []resend.Request{request(0, 97*s, 97*s), request(0, 98*s, 98*s)}
	tests := []struct {
		name     string
		patience resend.Patience
		lost     []resend.Request
		blind    bool
		arrivals []arrival // after a death at 100 s
	}{
		{"a repetition", patience, first, false, []arrival{{101 * s, key(0), 97 * s}}},
		{"is found once", patience, first, false,
			[]arrival{{101 * s, key(0), 97 * s}, {102 * s, key(0), 102 * s}}},
		{"twice the same", patience, two, false,
			[]arrival{{101 * s, key(0), 97 * s}, {102 * s, key(0), 98 * s}}},
		{"of a repetition", patience, repeated, false, []arrival{{101 * s, key(0), 91 * s}}},
		{"another offset, length or operation", patience, first, false,
			[]arrival{{101 * s, key(4096), 101 * s}, {101 * s, long, 101 * s}, {101 * s, write, 101 * s}}},
		{"as late as can be", patience, first, false, []arrival{{120*s - 1, key(0), 97 * s}}},
		{"too late", patience, first, false, []arrival{{120 * s, key(0), 120 * s}}},
		{"unknown, as long as it may be a repetition", patience, nil, true,
			[]arrival{{101 * s, key(0), 98 * s}, {105*s - 1, key(0), 102*s - 1}, {105 * s, key(0), 105 * s}}},
		{"nobody repeats anything", resend.Patience{}, first, true, []arrival{{101 * s, key(0), 101 * s}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var j resend.Judge
			j.SetPatience(tt.patience)
			if j.Active() {
				t.Error("active before anything has died")
			}
			j.Lost(100*s, tt.lost, nil, tt.blind)
			if active := tt.patience.Resend > 0; j.Active() != active {
				t.Errorf("active: %v", j.Active())
			}
			for _, a := range tt.arrivals {
				if r := j.Judge(a.now, a.key); r.First != a.first || r.Arrived != a.now || r.Key != a.key || r.Suspect {
					t.Errorf("at %v: %+v, want the first at %v", a.now, r, a.first)
				}
			}
		})
	}
}

// TestJudgeForgets holds the bound of what is remembered: then everything may be a repetition.
func TestJudgeForgets(t *testing.T) {
	var j resend.Judge
	j.SetPatience(patience)
	var lost []resend.Request
	for i := range 5000 {
		lost = append(lost, request(uint64(i)*4096, 90*s, 90*s))
	}
	j.Lost(100*s, lost, nil, false)
	if r := j.Judge(101*s, key(4999*4096)); r.First != 90*s {
		t.Errorf("the latest: %+v", r)
	}
	if r := j.Judge(101*s, key(0)); r.First != 98*s {
		t.Errorf("one that was forgotten: %+v, want the time of a repetition that is not known", r)
	}
}

// TestAdopt holds that a repetition is known, too, that came before the death of its first
// connection was.
func TestAdopt(t *testing.T) {
	tests := []struct {
		name  string
		r     resend.Request
		first time.Duration
	}{
		{"came a moment before", request(0, 100*s-1, 100*s-1), 97 * s},
		{"came before the client could have repeated it", request(0, 97*s, 97*s), 97 * s},
		{"is another", request(4096, 100*s-1, 100*s-1), 100*s - 1},
		{"is a repetition of something else", request(0, 100*s-1, 92*s), 92 * s},
		{"came before the first", request(0, 96*s, 96*s), 96 * s},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var j resend.Judge
			j.SetPatience(patience)
			j.Lost(100*s, []resend.Request{request(0, 97*s, 97*s)}, nil, false)
			r := tt.r
			adopted := j.Adopt(100*s, &r)
			if r.First != tt.first || adopted != (tt.first < tt.r.First) {
				t.Errorf("adopted %v, first at %v, want %v", adopted, r.First, tt.first)
			}
			if again := j.Judge(101*s, key(0)).First; adopted && again != 101*s || !adopted && again != 97*s {
				t.Errorf("the next one came first at %v", again)
			}
		})
	}
}

// TestOverdue holds which requests of a connection are to be answered, and when.
func TestOverdue(t *testing.T) {
	long := resend.Patience{Resend: 30 * s, Total: 47 * s}
	suspect := request(8192, 100*s, 100*s)
	suspect.Suspect = true
	tests := []struct {
		name     string
		patience resend.Patience
		now      time.Duration
		requests []resend.Request
		due      []int
	}{
		{"a first time is left to the client", patience, 200 * s, []resend.Request{request(0, 100*s, 100*s)}, nil},
		{"a repetition before its time", patience, 109*s + 999*time.Millisecond,
			[]resend.Request{request(0, 108*s, 90*s)}, nil},
		{"a repetition after its time", patience, 110 * s, []resend.Request{request(0, 108*s, 90*s)}, []int{0}},
		{"one that comes after its time has a moment", patience, 111*s - 1,
			[]resend.Request{request(0, 110*s, 80*s)}, nil},
		{"and no more", patience, 111 * s, []resend.Request{request(0, 110*s, 80*s)}, []int{0}},
		{"one that would cost the connection at the last moment", patience, 109*s + 625*time.Millisecond,
			[]resend.Request{request(0, 107*s, 90*s)}, []int{0}},
		{"one that will be repeated in time", patience, 106 * s, []resend.Request{request(0, 103*s, 90*s)}, nil},
		{"what overlaps something stuck", patience, 102*s + 625*time.Millisecond, []resend.Request{suspect}, []int{0}},
		{"before that", patience, 102*s + 624*time.Millisecond, []resend.Request{suspect}, nil},
		{"one that another would strand", long, 130*s - time.Second,
			[]resend.Request{request(0, 100*s, 100*s), request(4096, 126*s, 95*s)}, []int{1}},
		{"one that another would strand, and has hardly come", long, 130 * s,
			[]resend.Request{request(0, 100*s, 100*s), request(4096, 130*s-10*time.Millisecond, 95*s)}, nil},
		{"not before", long, 130*s - time.Second - 1,
			[]resend.Request{request(0, 100*s, 100*s), request(4096, 126*s, 95*s)}, nil},
		{"one that another does not strand", long, 130*s - time.Second,
			[]resend.Request{request(0, 100*s, 100*s), request(4096, 110*s, 95*s)}, nil},
		{"nobody repeats anything", resend.Patience{}, 1000 * s, []resend.Request{request(0, 100*s, 90*s)}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var j resend.Judge
			j.SetPatience(tt.patience)
			if due := j.Overdue(tt.now, tt.requests); !slices.Equal(due, tt.due) {
				t.Errorf("due are %v, want %v", due, tt.due)
			}
		})
	}
}

// TestStuck holds that what the backend never came back from makes suspect what overlaps it, and
// keeps the episode going.
func TestStuck(t *testing.T) {
	var j resend.Judge
	j.SetPatience(patience)
	j.Lost(100*s, nil, nil, false)
	j.SetStuck([]resend.Key{key(8192)})
	for off, suspect := range map[uint64]bool{
		0: false, 4096: false, 4097: true, 8192: true, 12287: true, 12288: false,
	} {
		if r := j.Judge(101*s, key(off)); r.Suspect != suspect {
			t.Errorf("at %d: %+v", off, r)
		}
	}
	if j.Quiet(1000*s, false) || !j.Active() {
		t.Error("quiet while something is stuck")
	}
	j.SetStuck(nil)
	if r := j.Judge(101*s, key(8192)); r.Suspect {
		t.Error("suspect of what is not stuck any more")
	}
	if j.Quiet(119*s, false) || j.Quiet(1000*s, true) || !j.Quiet(120*s, false) || j.Active() {
		t.Error("the episode does not end when no repetition is to be expected")
	}
}

// TestBound plays a client whose backend never answers, with deaths at bad moments, and holds that
// every request is answered at the latest 10 s after timeout and dead timeout.
func TestBound(t *testing.T) {
	for _, tt := range []struct{ timeout, dead, stagger time.Duration }{
		{1 * s, 1 * s, s / 10},
		{3 * s, 10 * s, s / 2},
		{30 * s, 0, 3 * s},
		{30 * s, 10 * s, 7 * s},
		{30 * s, 60 * s, 11 * s},
		{90 * s, 30 * s, 29 * s},
	} {
		var j resend.Judge
		p := resend.Patience{Resend: tt.timeout, Total: tt.timeout + tt.dead + 7*s}
		j.SetPatience(p)
		type sent struct {
			first, again time.Duration // again: when it is sent over the next connection
			answered     bool
		}
		requests := make([]sent, 20)
		for i := range requests {
			requests[i] = sent{first: time.Duration(i) * tt.stagger, again: time.Duration(i) * tt.stagger}
		}
		inFlight := map[int]resend.Request{}
		died := false
		end := requests[len(requests)-1].first + 4*p.Total
		for now := time.Duration(0); now < end; now += p.Tick() {
			for i := range requests { // the client
				r := &requests[i]
				if r.answered || r.again > now {
					continue
				}
				if _, ok := inFlight[i]; !ok {
					judged := resend.Request{Key: key(uint64(i) * 4096), Arrived: now, First: now}
					if j.Active() {
						judged = j.Judge(now, key(uint64(i)*4096))
					}
					inFlight[i], r.again = judged, now+tt.timeout
				} else {
					died = true // It has waited for its timeout.
				}
			}
			if died {
				var lost []resend.Request
				for i, r := range inFlight {
					lost = append(lost, r)
					requests[i].again = max(requests[i].again, now)
				}
				clear(inFlight)
				died = false
				j.Lost(now, lost, nil, false)
			}
			if !j.Active() {
				continue
			}
			var list []resend.Request
			var which []int
			for i, r := range inFlight {
				list, which = append(list, r), append(which, i)
			}
			for _, n := range j.Overdue(now, list) {
				i := which[n]
				requests[i].answered = true
				delete(inFlight, i)
				if took, limit := now-requests[i].first, tt.timeout+tt.dead+10*s; took > limit {
					t.Errorf("timeout %v, dead timeout %v: request %d was answered after %v, want %v",
						tt.timeout, tt.dead, i, took, limit)
				} else if took < tt.timeout {
					t.Errorf("timeout %v: request %d was answered after %v", tt.timeout, i, took)
				}
			}
		}
		for i, r := range requests {
			if !r.answered {
				t.Errorf("timeout %v, dead timeout %v: request %d was never answered", tt.timeout, tt.dead, i)
			}
		}
	}
}

// TestLate holds which requests are answered as soon as they arrive, at 100 s.
func TestLate(t *testing.T) {
	for _, tt := range []struct {
		name string
		r    resend.Request
		want bool
	}{
		{"new", resend.Request{First: 100 * s}, false},
		{"new, suspect", resend.Request{First: 100 * s, Suspect: true}, false},
		{"repeated", resend.Request{First: 97 * s, Times: 1}, false},
		{"repeated often", resend.Request{First: 91 * s, Times: 3}, false},
		{"repeated, its total over", resend.Request{First: 10 * s, Times: 1}, false},
		{"repeated twice, its total over", resend.Request{First: 10 * s, Times: 2}, true},
		{"repeated, suspect", resend.Request{First: 97 * s, Times: 1, Suspect: true}, true},
	} {
		tt.r.Key, tt.r.Arrived = key(0), 100*s
		var j resend.Judge
		if j.Late(100*s, tt.r) {
			t.Errorf("%s: late for a client that never sends anything again", tt.name)
		}
		j.SetPatience(patience)
		if got := j.Late(100*s, tt.r); got != tt.want {
			t.Errorf("%s: late: %t, want %t", tt.name, got, tt.want)
		}
	}
	var j resend.Judge
	j.SetPatience(patience)
	if flush := (resend.Request{Arrived: 100 * s, First: 10 * s, Times: 5}); j.Late(100*s, flush) {
		t.Error("a flush, which nothing tells from others, is late when it arrives")
	}
}

// TestBoundBusy plays a client of a machine that is so busy that a request waits to be received,
// for a part of the timeout that the server knows nothing of, and that an answer comes too late.
// The bound holds all the same.
func TestBoundBusy(t *testing.T) {
	const timeout, dead, reconnects = s, 2 * s, s / 2
	p := resend.Patience{Resend: timeout, Total: timeout + dead + 7*s}
	for _, delay := range []time.Duration{0, s / 10, s / 4, s / 2, 8 * s / 10, 97 * s / 100} {
		for _, unheard := range []int{0, 1} { // answers that the client does not get
			var j resend.Judge
			j.SetPatience(p)
			now, took := time.Duration(0), time.Duration(0)
			for left := unheard; took == 0 && now < 10*p.Total; now += reconnects {
				// The request is sent over a new connection, and waits.
				dies := now + timeout
				now += delay
				r := resend.Request{Key: key(0), Arrived: now, First: now}
				if j.Active() {
					if now >= p.Total {
						j.SetStuck([]resend.Key{key(0)})
					}
					r = j.Judge(now, key(0))
				}
				answered := j.Active() && j.Late(now, r)
				for !answered && now < dies {
					now += p.Tick()
					answered = j.Active() && now < dies && len(j.Overdue(now, []resend.Request{r})) > 0
				}
				switch {
				case answered && left == 0:
					took = now
				case answered:
					left--
					now = dies
					j.Lost(now, nil, []resend.Request{r}, false)
				default:
					j.Lost(now, []resend.Request{r}, nil, false)
				}
			}
			if took > 0 && took < timeout+dead {
				t.Errorf("received after %v, %d answers lost: the client was told after %v", delay, unheard, took)
			}
			if limit := timeout + dead + 10*s; took == 0 || took > limit {
				t.Errorf("received after %v, %d answers lost: the client was told after %v, want %v",
					delay, unheard, took, limit)
			}
		}
	}
}
