// Nbdctl connects, lists and disconnects NBD block devices that are served
// from user space. See nbdctl --help and the README.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

func main() {
	os.Exit(int(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)))
}

// run is the whole program: it runs the command that args name and returns
// its exit code, having written an error, if there is one, to stderr.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) exit.Code {
	app := newApp(stdout, stderr)
	err := app.RunContext(ctx, append([]string{app.Name}, permute(app, args)...))
	if err != nil {
		// Errors that have several causes say one in a line.
		for line := range strings.SplitSeq(err.Error(), "\n") {
			fmt.Fprintf(stderr, "nbdctl: %s\n", harmless(line))
		}
	}
	return exit.Of(err)
}

// harmless is a line that does nothing to a terminal: what a server or a file has to say may be in
// it.
func harmless(line string) string {
	if !strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) && r != '\t' }) {
		return line
	}
	quoted := strconv.Quote(line)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}
