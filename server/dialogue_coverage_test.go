package server_test

import (
	"fmt"
	"strings"
	"testing"
)

// dialogueForms are the forms that replies have.
var dialogueForms = []string{"simple", "structured", "extended"}

// neverSaid are names that no server has to say, and this one does not.
var neverSaid = map[string]string{
	"NBD_REP_ERR_PLATFORM":        "TLS is there on every platform",
	"NBD_REP_ERR_SHUTDOWN":        "who negotiates is cut",
	"NBD_REP_ERR_BLOCK_SIZE_REQD": "clients that know no block sizes are served",
	"NBD_FLAG_ROTATIONAL":         "backends do not tell",
	"NBD_FLAG_SEND_RESIZE":        "an extension that is not served",
}

// flagNames has the names of command flags, by bit. Bit 6 stands for those that are unknown.
var flagNames = []string{"FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO", "PAYLOAD_LEN", "unknown"}

// TestDialoguesCover holds that the dialogues have every option, each granted and refused where it
// can be; every reply to one, information and flag that the server says; and in every form every
// command, alone and with each flag, and every error.
func TestDialoguesCover(t *testing.T) {
	seen := seenInDialogues(t)
	for _, missing := range uncovered(seen) {
		t.Errorf("no dialogue has %s", missing)
	}
	for key := range seen {
		for name, why := range neverSaid {
			if key == neverKey(name) {
				t.Errorf("a dialogue has %s, though %s", name, why)
			}
		}
	}
}

// seenInDialogues returns what occurs in the dialogues, and how often.
func seenInDialogues(t *testing.T) map[string]int {
	t.Helper()
	all, err := allDialogues()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]int)
	for _, d := range all {
		read := transcript{seen: seen}
		read.steps(d.steps)
	}
	return seen
}

// neverKey is what a transcript calls the name.
func neverKey(name string) string {
	if strings.HasPrefix(name, "NBD_REP_") {
		return fmt.Sprintf("reply %d", dialogueNames[name])
	}
	return fmt.Sprintf("transmission flag %d", bitOf(name))
}

// bitOf returns the number of the bit that a name stands for.
func bitOf(name string) (bit int) {
	for dialogueNames[name]>>bit > 1 {
		bit++
	}
	return bit
}

// uncovered returns what is to occur in the dialogues, and has not been seen.
func uncovered(seen map[string]int) (missing []string) {
	need := func(what, format string, args ...any) {
		if seen[fmt.Sprintf(format, args...)] == 0 {
			missing = append(missing, what)
		}
	}
	for name, n := range dialogueNames {
		switch _, never := neverSaid[name]; {
		case never:
		case strings.HasPrefix(name, "NBD_OPT_"):
			needOption(need, name, n)
		case strings.HasPrefix(name, "NBD_REP_") && name != "NBD_REP_MAGIC":
			need(name, "reply %d", n)
		case strings.HasPrefix(name, "NBD_INFO_"):
			need(name, "info %d", n)
		case strings.HasPrefix(name, "NBD_CMD_FLAG_"):
		case strings.HasPrefix(name, "NBD_CMD_"):
			needCommand(need, name, n)
		case strings.HasPrefix(name, "NBD_REPLY_TYPE_"):
			needChunk(need, name, n)
		case strings.HasPrefix(name, "NBD_E") && !strings.HasSuffix(name, "_MAGIC"):
			for _, form := range dialogueForms {
				need(name+" in "+form+" form", "error %d %s", n, form)
			}
		case strings.HasPrefix(name, "NBD_FLAG_C_"), name == "NBD_FLAG_FIXED_NEWSTYLE", name == "NBD_FLAG_NO_ZEROES":
			// Handshake flags, whose values are below.
		case strings.HasPrefix(name, "NBD_FLAG_"):
			need(name, "transmission flag %d", bitOf(name))
		}
	}
	for flags := range 4 {
		need(fmt.Sprintf("the client flags %d", flags), "client flags %d", flags)
	}
	need("unknown client flags", "client flags %d", 1<<2)
	needOption(need, "an unknown option", 99)
	needCommand(need, "an unknown command", 1<<16-1)
	need("TLS", "tls")
	return missing
}

// needOption needs an option, and both outcomes where there are two.
func needOption(need func(string, string, ...any), name string, n uint64) {
	switch name {
	case "NBD_OPT_EXPORT_NAME": // It is refused without a reply.
		need(name, "option %d", n)
		need(name+", granted", "option %d chosen", n)
	case "NBD_OPT_ABORT":
		need(name+", granted", "option %d granted", n)
	case "NBD_OPT_PEEK_EXPORT", "an unknown option":
		need(name+", refused", "option %d refused", n)
	default:
		need(name+", granted", "option %d granted", n)
		need(name+", refused", "option %d refused", n)
	}
}

func needCommand(need func(string, string, ...any), name string, n uint64) {
	for _, form := range dialogueForms {
		need(name+" in "+form+" form", "command %d %s", n, form)
		for bit, flag := range flagNames {
			need(name+" in "+form+" form with flag "+flag, "command %d %s flag %d", n, form, bit)
		}
	}
}

// needChunk needs a type of chunk in each form that has it.
func needChunk(need func(string, string, ...any), name string, n uint64) {
	for _, form := range dialogueForms[1:] {
		if name == "NBD_REPLY_TYPE_BLOCK_STATUS" && form == "extended" ||
			name == "NBD_REPLY_TYPE_BLOCK_STATUS_EXT" && form == "structured" {
			continue
		}
		need(name+" in "+form+" form", "chunk %d %s", n, form)
	}
}

// TestUncovered holds that each thing which no dialogue has is missed.
func TestUncovered(t *testing.T) {
	seen := seenInDialogues(t)
	for _, key := range []string{
		"option 5 refused", "option 1 chosen", "reply 4", "info 2",
		"command 8 extended", "command 4 structured flag 3", "command 2 simple flag 6",
		"error 108 simple", "chunk 32770 structured", "transmission flag 12", "client flags 2",
	} {
		n := seen[key]
		if n == 0 {
			t.Errorf("%s has not been seen", key)
		}
		delete(seen, key)
		if missing := uncovered(seen); len(missing) != 1 {
			t.Errorf("without %s, what is missed is %q", key, missing)
		}
		seen[key] = n
	}
}
