//! Draws cases until the model disagrees: exit status 1 and what it says, or 0 if it never does. The
//! arguments are the number of cases and, if not the usual one, the seed.

#[path = "../../src/host.rs"]
pub mod host;
#[path = "../../src/packet.rs"]
pub mod packet;
#[path = "../../src/sequence/mod.rs"]
pub mod sequence;
#[path = "../../src/world.rs"]
pub mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    let number = |n| std::env::args().nth(n).and_then(|text| text.parse::<u32>().ok());
    let cases = number(1).expect("a number of cases");
    match sequence::hunt(cases, number(2).unwrap_or(1).into(), &mut ()) {
        Ok(hunt) => {
            println!("{} cases, {} packets, all lawful", hunt.cases, hunt.packets);
            ExitCode::SUCCESS
        }
        Err(prey) => {
            let packets = prey.report.packets();
            let failure = prey.report.failure.expect("it failed");
            println!("found with {packets} packets:\n{}", failure.0);
            ExitCode::FAILURE
        }
    }
}
