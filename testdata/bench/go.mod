module github.com/nbdctl/nbdctl/testdata/bench

go 1.25.0

require (
	github.com/nbdctl/nbdctl v0.0.0
	github.com/pojntfx/go-nbd v0.3.2
)

require golang.org/x/sys v0.47.0 // indirect

replace github.com/nbdctl/nbdctl => ../..
