package server

import (
	"testing"

	"github.com/nbdctl/nbdctl/server/wire"
)

func TestPlan(t *testing.T) {
	var (
		none    situation
		refused = situation{refused: true, inline: true, room: true}
		inline  = situation{inline: true}
		arrived = situation{arrived: true}
		both    = situation{inline: true, arrived: true, room: true}
		room    = situation{inline: true, room: true}
		counted = situation{counted: true}

		plain  = abilities{}
		syncs  = abilities{syncs: true, durable: true}
		fua    = abilities{durable: true}
		direct = abilities{readTo: true, writeFrom: true, syncs: true, durable: true}

		read    = wire.Request{Command: wire.CmdRead, Length: 4096}
		long    = wire.Request{Command: wire.CmdRead, Length: slabSize + 1}
		write   = wire.Request{Command: wire.CmdWrite, Length: 4096}
		large   = wire.Request{Command: wire.CmdWrite, Length: maxKept + 1}
		durable = wire.Request{Command: wire.CmdWrite, Length: 4096, Flags: wire.CmdFlagFUA}
		flush   = wire.Request{Command: wire.CmdFlush}
		trim    = wire.Request{Command: wire.CmdTrim, Length: 4096}
		zeroes  = wire.Request{Command: wire.CmdWriteZeroes, Length: 4096}
		unknown = wire.Request{Command: 99, Length: 4096}
	)
	none.room = true
	for _, tt := range []struct {
		name string
		h    wire.Request
		a    abilities
		s    situation
		want plan
	}{
		{"read, slow backend", read, plain, none, planStart},
		{"read, quick backend", read, plain, inline, planRead},
		{"read, longer than the batch's memory", long, plain, inline, planStart},
		{"read, backend gives references", read, direct, none, planReadTo},
		{"long read, backend gives references", long, direct, none, planReadTo},
		{"read of nothing", wire.Request{Command: wire.CmdRead}, direct, none, planNothing},
		{"read, refused", read, direct, refused, planRefuse},

		{"write, slow backend", write, plain, arrived, planStart},
		{"write, slow backend, on its way", write, plain, none, planStart},
		{"write, quick backend", write, plain, both, planWrite},
		{"write, quick backend, on its way", write, plain, room, planGather},
		{"write, quick backend, no room", write, plain, inline, planStart},
		{"write, backend takes it", write, direct, arrived, planWriteFrom},
		{"write, backend takes it on its way", write, direct, none, planWriteFrom},
		{"large write, backend takes it", large, direct, none, planWriteFrom},
		{"large write, would not be counted", large, direct, counted, planStart},
		{"small write, need not be counted", write, direct, counted, planWriteFrom},
		{"large write, has arrived", large, direct, situation{counted: true, arrived: true}, planWriteFrom},
		{"durable write", durable, direct, arrived, planStart},
		{"durable write, backend with FUA", durable, fua, arrived, planStart},
		{"durable write, nothing to sync", durable, plain, both, planWrite},
		{"write of nothing", wire.Request{Command: wire.CmdWrite}, direct, arrived, planNothing},
		{"durable write of nothing", wire.Request{Command: wire.CmdWrite, Flags: wire.CmdFlagFUA}, direct, arrived,
			planNothing},
		{"write, refused", write, plain, refused, planRefuse},
		{"write of nothing, refused", wire.Request{Command: wire.CmdWrite}, plain, refused, planRefuse},
		{"longest write", wire.Request{Command: wire.CmdWrite, Length: wire.MaxPayload}, plain, none, planStart},
		{"write beyond the protocol", wire.Request{Command: wire.CmdWrite, Length: wire.MaxPayload + 1}, plain,
			situation{payload: wire.MaxPayload + 1}, planCut},
		{"payload beyond the protocol, refused", trim, plain, situation{payload: 1 << 63, refused: true}, planCut},

		{"flush", flush, syncs, inline, planStart},
		{"flush, nothing to sync", flush, plain, none, planNothing},
		{"flush, FUA only", flush, fua, none, planNothing},
		{"flush, refused", wire.Request{Command: wire.CmdFlush, Length: 1}, plain, refused, planRefuse},
		{"trim", trim, plain, inline, planStart},
		{"trim of nothing", wire.Request{Command: wire.CmdTrim}, plain, none, planNothing},
		{"zeroes", zeroes, direct, none, planStart},
		{"zeroes of nothing", wire.Request{Command: wire.CmdWriteZeroes}, direct, none, planNothing},
		{"unknown, refused", unknown, direct, refused, planRefuse},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := planOf(&tt.h, tt.a, tt.s); got != tt.want {
				t.Errorf("got plan %d, want %d", got, tt.want)
			}
		})
	}
}

// TestPlanHolds has what executors rely on, in all situations.
func TestPlanHolds(t *testing.T) {
	flags := []bool{false, true}
	for _, command := range []wire.Command{wire.CmdRead, wire.CmdWrite, wire.CmdFlush, wire.CmdTrim,
		wire.CmdWriteZeroes, 99} {
		for _, length := range []uint64{0, 1, slabSize, slabSize + 1, maxKept + 1, wire.MaxPayload,
			wire.MaxPayload + 1} {
			for i := range 1 << 10 {
				bit := func(n int) bool { return flags[i>>n&1] }
				h := wire.Request{Command: command, Length: length}
				if bit(0) {
					h.Flags = wire.CmdFlagFUA
				}
				a := abilities{readTo: bit(1), writeFrom: bit(2), syncs: bit(3), durable: bit(4)}
				s := situation{payload: h.Payload(false), refused: bit(5), inline: bit(6), arrived: bit(7),
					room: bit(8), counted: bit(9)}
				p := planOf(&h, a, s)
				write, reaches := command == wire.CmdWrite, false
				var right bool
				switch p {
				case planCut:
					right = write && length > wire.MaxPayload
				case planRefuse:
					right = s.refused
				case planNothing:
					right = !s.refused && (length == 0 || command == wire.CmdFlush && !a.syncs)
				case planGather:
					right = write && !s.arrived && s.room && s.inline
				case planReadTo:
					right = command == wire.CmdRead && a.readTo
					reaches = true
				case planRead:
					right = command == wire.CmdRead && s.inline && length <= slabSize
					reaches = true
				case planWriteFrom:
					right = write && a.writeFrom && !a.durably(&h)
					reaches = true
				case planWrite:
					right = write && s.inline && s.arrived && !a.durably(&h)
					reaches = true
				default:
					right = true
					reaches = true
				}
				if !right || reaches && (s.refused || length == 0 && command != wire.CmdFlush ||
					write && length > wire.MaxPayload) {
					t.Fatalf("plan %d for %+v, %+v, %+v", p, h, a, s)
				}
			}
		}
	}
}
