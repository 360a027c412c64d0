package doctor

import (
	"context"
	"slices"
	"strings"

	"github.com/nbdctl/nbdctl/cmd/nbdctl/internal/exit"
)

// A Check looks at one thing. It has something to say in any case.
type Check struct {
	Name string
	Look func(ctx context.Context) []Finding
}

// Examine makes the checks in their order, passing on what each has found. With
// fix it also does the remedies that are nbdctl's, and passes on what is found
// thereafter.
func Examine(ctx context.Context, checks []Check, fix bool, found func(Finding)) []Finding {
	var all []Finding
	for _, c := range checks {
		findings := c.Look(ctx)
		if fix {
			findings = c.mend(ctx, findings)
		}
		for _, f := range findings {
			f.Check = c.Name
			all = append(all, f)
			found(f)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return all
}

// mend does the remedies of the findings that have one, and looks again. What
// was mended is reported as it was found, and what was done.
func (c Check) mend(ctx context.Context, findings []Finding) []Finding {
	var mended, failed []Finding
	for _, f := range findings {
		if f.Fix == nil {
			continue
		}
		done, err := f.Fix()
		if err != nil {
			f.Result, f.Code = Problem, exit.Of(err)
			if f.Code != exit.Permission && f.Code != exit.Unsupported {
				f.Code = exit.Failure // doctor itself was not asked for a device that could be busy, or not be there
			}
			f.Why = "the remedy has failed: " + oneLine(err)
			failed = append(failed, f)
			continue
		}
		mended = append(mended, Finding{Result: OK, Seen: f.Seen, Fixed: done, Fix: f.Fix})
	}
	if mended == nil && failed == nil {
		return findings
	}
	mended = append(mended, failed...)
	for _, f := range c.Look(ctx) {
		// What could not be mended is found again.
		if f.Result != OK && !slices.ContainsFunc(failed, func(known Finding) bool { return known.Seen == f.Seen }) {
			mended = append(mended, f)
		}
	}
	return mended
}

// oneLine is err's text without the newlines of joined errors.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// Code is the exit code of the worst finding: OK unless something is a
// problem, and of several problems that which connect meets first, which is a
// missing privilege, then a missing driver, then anything else.
func Code(findings []Finding) exit.Code {
	code := exit.OK
	for _, f := range findings {
		if f.Result == Problem && rank(f.Code) > rank(code) {
			code = f.Code
		}
	}
	return code
}

func rank(c exit.Code) int {
	switch c {
	case exit.OK:
		return 0
	case exit.Permission:
		return 3
	case exit.Unsupported:
		return 2
	}
	return 1
}
