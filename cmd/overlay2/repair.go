//go:build linux

package main

import (
	"fmt"
	"io"

	"github.com/bcc2decd/overlay2"
	"github.com/spf13/cobra"
)

func (a *app) repairCommand() *cobra.Command {
	var opts overlay2.RepairOpts
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "mend what check finds, where it is certain what is right; exit code 1 if something is left",
		Long: `Mends what check finds, where it is certain what is right: links, link files and chains that other files
say, markers, mount points, modes, what crashes left. The content of layers is never touched. What cannot
be mended is listed at the end, and stays as it is.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return a.repair(opts) },
	}
	f := cmd.Flags()
	f.BoolVarP(&opts.DryRun, "dry-run", "n", false, "only list what would be done")
	f.BoolVar(&opts.RemoveOrphans, "remove-orphans", false, "delete layers that nothing leads to")
	return cmd
}

type action struct {
	Where string `json:"where"`
	What  string `json:"what"`
	Why   string `json:"why"`
	Error string `json:"error,omitempty"`
}

func (a *app) repair(opts overlay2.RepairOpts) error {
	actions, problems := []action{}, []problem{}
	err := a.existingLocked(func(d *overlay2.Driver) error {
		done, repairErr := d.Repair(opts)
		for _, s := range done {
			act := action{Where: s.Path, What: s.What, Why: s.Why}
			if s.Err != nil {
				act.Error = s.Err.Error()
			}
			actions = append(actions, act)
		}
		if repairErr != nil && len(done) == 0 {
			return repairErr
		}
		left, err := d.Check()
		for _, p := range left {
			problems = append(problems, problem{p.Path, p.Err.Error()})
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	err = a.result(struct {
		Actions  []action  `json:"actions"`
		Problems []problem `json:"problems"`
	}{actions, problems}, func(w io.Writer) error {
		for _, s := range actions {
			text := printable(s.Where) + ": " + printable(s.What) + " (" + printable(s.Why) + ")"
			if s.Error != "" {
				text += ": " + printable(s.Error)
			}
			if err := line("%s", text)(w); err != nil {
				return err
			}
		}
		for _, p := range problems {
			if err := line("left: %s: %s", printable(p.Where), printable(p.Problem))(w); err != nil {
				return err
			}
		}
		if len(actions)+len(problems) == 0 {
			return line("nothing to do")(w)
		}
		return nil
	})
	if err == nil && len(problems) > 0 {
		return fmt.Errorf("repair: %d problems %w", len(problems), errFound)
	}
	return err
}
