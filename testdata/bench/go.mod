module github.com/nbdctl/nbdctl/testdata/bench

go 1.25.0

require (
	github.com/nbdctl/nbdctl v0.0.0
	github.com/pojntfx/go-nbd v0.3.2
)

require (
	github.com/google/go-cmp v0.7.0 // indirect
	github.com/mdlayher/socket v0.6.0 // indirect
	github.com/mdlayher/vsock v1.2.1 // indirect
	golang.org/x/net v0.53.0 // indirect
	golang.org/x/sync v0.20.0 // indirect
)

require (
	github.com/mdlayher/genetlink v1.4.0
	github.com/mdlayher/netlink v1.11.2
	golang.org/x/sys v0.47.0
)

replace github.com/nbdctl/nbdctl => ../..
