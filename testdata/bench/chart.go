package main

import (
	"fmt"
	"html"
	"slices"
	"strings"
)

// bars are the cases of the chart, with what people call them.
var bars = []struct{ on, title string }{
	{"memory/rr4k-q1", "4k read, 1 in flight"},
	{"memory/rr4k-q32", "4k read, 32 in flight"},
	{"memory/rw4k-q32", "4k write, 32 in flight"},
	{"memory/rr4k-q32-k", "4k read, 32, framed as the kernel does"},
	{"memory/rw4k-q32-k", "4k write, 32, framed as the kernel does"},
	{"memory/rr128k-q16", "128k read, 16 in flight"},
	{"memory/rw128k-q16", "128k write, 16 in flight"},
	{"memory/sr1m-q8", "1M read, 8 in flight"},
	{"memory/sw1m-q8", "1M write, 8 in flight"},
}

const chartTitle = "Throughput on one processor, as a share of the floor: " +
	"a C program that does nothing but the work"

// Of the chart, in pixels.
const (
	chartWidth  = 860
	chartLeft   = 270 // where bars begin
	chartUnit   = 480 // for a ratio of 1
	chartTop    = 64
	barHeight   = 9
	groupMargin = 14
)

var colours = map[string]string{
	"nbdctl":      "#0969da",
	"nbdkit":      "#9a6700",
	"nbdkit -t 1": "#d4a72c",
	"qemu-nbd":    "#cf6a4c",
	"nbd-server":  "#8250df",
	"go-nbd":      "#57606a",
}

// chart draws the requests in a second of CPU time of all servers as a share of the floor's: with
// client and server on one processor that is the throughput, whoever else is at work. It has no
// bars for what was not measured.
func chart(results []*result) []byte {
	var b strings.Builder
	y := chartTop
	for _, bar := range bars {
		i := slices.IndexFunc(results, func(r *result) bool { return r.Case == bar.on })
		if i >= 0 {
			y = drawGroup(&b, results[i], bar.title, y)
		}
	}
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" `+
		`font-family="sans-serif" font-size="12">`+"\n", chartWidth, y+24)
	fmt.Fprintf(&out, `<rect width="100%%" height="100%%" fill="#ffffff"/>`+"\n")
	fmt.Fprintf(&out, `<text x="16" y="24" font-size="15" fill="#1f2328">%s</text>`+"\n", chartTitle)
	drawLegend(&out)
	for _, share := range []float64{0, 0.25, 0.5, 0.75, 1} {
		x := chartLeft + share*chartUnit
		fmt.Fprintf(&out, `<line x1="%.0f" x2="%.0f" y1="%d" y2="%d" stroke="#d0d7de"/>`, x, x, chartTop-6, y)
		fmt.Fprintf(&out, `<text x="%.0f" y="%d" text-anchor="middle" fill="#57606a">%g</text>`+"\n",
			x, y+16, share)
	}
	out.WriteString(b.String())
	out.WriteString("</svg>\n")
	return []byte(out.String())
}

func drawLegend(out *strings.Builder) {
	x := 16
	for _, name := range []string{"nbdctl", "nbdkit", "nbdkit -t 1", "qemu-nbd", "nbd-server", "go-nbd"} {
		fmt.Fprintf(out, `<rect x="%d" y="36" width="10" height="10" fill="%s"/>`, x, colours[name])
		fmt.Fprintf(out, `<text x="%d" y="45" fill="#1f2328">%s</text>`+"\n", x+14, name)
		x += 34 + 7*len(name)
	}
}

// drawGroup draws the bars of a case, and returns where the next begins.
func drawGroup(out *strings.Builder, r *result, title string, y int) int {
	began := y
	for _, s := range r.Servers {
		ratio, ok := metric(byCPU).ratio(s, r.first(floor))
		if !ok || s.Role == floor {
			continue
		}
		width := ratio.Median * chartUnit
		fmt.Fprintf(out, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"><title>%s: %.2f</title></rect>`+"\n",
			chartLeft, y, width, barHeight-1, colours[s.Name], html.EscapeString(s.Name), ratio.Median)
		if s.Role == ours {
			fmt.Fprintf(out, `<text x="%.1f" y="%d" font-size="10" fill="#1f2328">%.2f</text>`+"\n",
				chartLeft+width+4, y+barHeight-1, ratio.Median)
		}
		y += barHeight
	}
	fmt.Fprintf(out, `<text x="%d" y="%d" text-anchor="end" fill="#1f2328">%s</text>`+"\n",
		chartLeft-10, (began+y)/2+4, html.EscapeString(title))
	return y + groupMargin
}
