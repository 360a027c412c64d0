package server_test

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// A dialogue is a vector of testdata/dialogues, whose README.md describes the format.
type dialogue struct {
	file, name string
	line       int
	exports    []string // of the server, by the names in dialogueExports
	server     []string // how else it differs from the usual one
	steps      []step
	fault      string // why the step faulty fails at present; empty: none does
	faulty     int
}

// A step is a line of a dialogue.
type step struct {
	do   string // "C", "S", or a word that stands alone
	data stream // of "C" and "S"
	at   string // file and line
}

// dialogueWords are the steps without data.
var dialogueWords = []string{"close", "cut", "end", "goodbye", "held", "open", "release", "shutdown", "tls"}

// A dialogueParser reads files of dialogues.
type dialogueParser struct {
	blocks    map[string][]step
	dialogues []*dialogue

	file  string
	line  int
	block string    // being read; empty: none
	open  *dialogue // being read; nil: none
}

// allDialogues are those of this package.
var allDialogues = sync.OnceValues(func() ([]*dialogue, error) { return readDialogues("testdata/dialogues") })

// readDialogues reads the files of a folder, preludes.txt first.
func readDialogues(dir string) ([]*dialogue, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		return nil, err
	}
	p := dialogueParser{blocks: make(map[string][]step)}
	slices.SortFunc(files, func(a, b string) int {
		first := func(s string) string { return strings.Replace(filepath.Base(s), "preludes.txt", "", 1) }
		return strings.Compare(first(a), first(b))
	})
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if err := p.parse(filepath.Base(file), string(text)); err != nil {
			return nil, err
		}
	}
	return p.dialogues, nil
}

// parse reads a file.
func (p *dialogueParser) parse(file, text string) error {
	p.file, p.block, p.open = file, "", nil
	var whole string // line, with those that continue it
	begun := 1
	for i, line := range append(strings.Split(text, "\n"), "") {
		line = strings.TrimRight(uncommented(line), " \t")
		if line != "" && (line[0] == ' ' || line[0] == '\t') {
			whole += " " + strings.TrimSpace(line)
			continue
		}
		p.line = begun
		if err := p.parseLine(whole); err != nil {
			return fmt.Errorf("%s:%d: %w", file, begun, err)
		}
		whole, begun = line, i+1
	}
	if err := p.finish(); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// uncommented returns the line without its comment.
func uncommented(line string) string {
	quoted := false
	for i := range len(line) {
		switch {
		case line[i] == '"' && (i == 0 || line[i-1] != '\\'):
			quoted = !quoted
		case line[i] == '#' && !quoted:
			return line[:i]
		}
	}
	return line
}

func (p *dialogueParser) parseLine(line string) error {
	if line == "" {
		return nil
	}
	word, rest, _ := strings.Cut(line, " ")
	rest = strings.TrimSpace(rest)
	switch word {
	case "block":
		err := p.finish()
		if p.block = rest; p.blocks[rest] != nil {
			return fmt.Errorf("a second block %q", rest)
		}
		return err
	case "vector":
		err := p.finish()
		p.open = &dialogue{file: p.file, name: rest, line: p.line, faulty: -1}
		for _, d := range p.dialogues {
			if d.file == p.file && d.name == rest {
				return fmt.Errorf("a second vector %q", rest)
			}
		}
		return err
	}
	if p.open == nil && p.block == "" {
		return fmt.Errorf("%q outside of a vector or a block", line)
	}
	if p.open != nil {
		switch word {
		case "exports:":
			p.open.exports = strings.Fields(rest)
			return nil
		case "server:":
			p.open.server = strings.Fields(rest)
			return nil
		case "fault:":
			p.open.fault, p.open.faulty = rest, len(p.open.steps)
			return nil
		}
	}
	steps, err := p.parseStep(word, rest)
	if p.open != nil {
		p.open.steps = append(p.open.steps, steps...)
	} else {
		p.blocks[p.block] = append(p.blocks[p.block], steps...)
	}
	return err
}

// parseStep reads a line that is a step, or stands for those of a block.
func (p *dialogueParser) parseStep(word, rest string) ([]step, error) {
	at := fmt.Sprintf("%s:%d", p.file, p.line)
	switch {
	case word == "C:" || word == "S:":
		data, err := parseTokens(rest)
		return []step{{strings.TrimSuffix(word, ":"), data, at}}, err
	case word == "use":
		return p.use(rest, at)
	case rest == "" && slices.Contains(dialogueWords, word):
		return []step{{word, nil, at}}, nil
	}
	return nil, fmt.Errorf("%q is no step", word)
}

// use returns the steps of a block.
func (p *dialogueParser) use(name, at string) ([]step, error) {
	steps := slices.Clone(p.blocks[name])
	if steps == nil {
		return nil, fmt.Errorf("no block %q so far", name)
	}
	for i := range steps {
		steps[i].at = at + ", " + steps[i].at
	}
	return steps, nil
}

// finish ends the vector or block that is being read. What a vector ends with says what has become
// of the connection: "open" stands for a block that shows it.
func (p *dialogueParser) finish() error {
	d := p.open
	p.open, p.block = nil, ""
	if d == nil {
		return nil
	}
	wrong := func(what string) error { return fmt.Errorf("vector %q %s", d.name, what) }
	if len(d.steps) == 0 {
		return wrong("has no steps")
	}
	if last := len(d.steps) - 1; d.steps[last].do == "open" {
		var read transcript
		read.steps(d.steps[:last])
		shown, err := p.use("open/"+read.phase(), d.steps[last].at)
		if err != nil {
			return wrong(err.Error())
		}
		d.steps = append(d.steps[:last], shown...)
	}
	last := d.steps[len(d.steps)-1].do
	if last != "end" && last != "goodbye" && last != "cut" {
		return wrong("does not say how it ends")
	}
	if d.faulty >= len(d.steps) {
		return wrong("has no step behind fault:")
	}
	p.dialogues = append(p.dialogues, d)
	return nil
}

// parseTokens returns the bytes that the tokens of a line stand for.
func parseTokens(line string) (all stream, err error) {
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		var p piece
		if line[0] == '"' {
			p, line, err = parseQuoted(line)
		} else {
			token, rest, _ := strings.Cut(line, " ")
			line = rest
			if p, err = parseToken(token); err != nil {
				err = fmt.Errorf("%s: %w", token, err)
			}
		}
		if err != nil {
			return nil, err
		}
		all = all.with(p)
	}
	return all, nil
}

// parseQuoted returns a text in quotes, as often as *N behind it says, and the rest of the line.
func parseQuoted(line string) (p piece, rest string, err error) {
	prefix, err := strconv.QuotedPrefix(line)
	if err != nil {
		return p, "", fmt.Errorf("%s: %w", line, err)
	}
	text, err := strconv.Unquote(prefix)
	if err != nil {
		return p, "", fmt.Errorf("%s: %w", line, err)
	}
	p = piece{[]byte(text), 1}
	behind, rest, _ := strings.Cut(line[len(prefix):], " ")
	if behind == "" {
		return p, rest, nil
	}
	count, ok := strings.CutPrefix(behind, "*")
	if !ok {
		return p, "", fmt.Errorf("%s is followed by %s", prefix, behind)
	}
	if p.times, err = evaluate(count); err != nil {
		return p, "", fmt.Errorf("%s%s: %w", prefix, behind, err)
	}
	return p, rest, nil
}

// parseToken returns a number, zeroes, or bytes in hexadecimal.
func parseToken(token string) (piece, error) {
	if count, ok := strings.CutPrefix(token, "zero*"); ok {
		n, err := evaluate(count)
		return piece{[]byte{0}, n}, err
	}
	kind, value, _ := strings.Cut(token, ":")
	if kind == "x" {
		raw, err := hex.DecodeString(value)
		return piece{raw, 1}, err
	}
	width := map[string]int{"u8": 1, "u16": 2, "u32": 4, "u64": 8}[kind]
	if width == 0 {
		return piece{}, fmt.Errorf("%q is no kind of token", kind)
	}
	n, err := evaluate(value)
	if err == nil && width < 8 && n>>(8*width) != 0 {
		err = fmt.Errorf("%d does not fit %d bytes", n, width)
	}
	return piece{binary.BigEndian.AppendUint64(nil, n)[8-width:], 1}, err
}
