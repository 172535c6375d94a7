//! From samples to figures.

use serde::Serialize;

/// The figures of one row. Times in nanoseconds per packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Median of the rounds.
    pub median: f64,
    /// Median of the distances from the median.
    pub mad: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Median of the rounds' ratios to F of the same round.
    pub ratio: f64,
    /// First quartile of these ratios.
    pub ratio_low: f64,
    /// Third quartile of these ratios.
    pub ratio_high: f64,
    /// `median` minus F's.
    pub net: f64,
}

/// The figures of `samples`, where `floors` has F of the same rounds. None without samples, or when
/// a round lacks one of the two.
pub fn summary(samples: &[f64], floors: &[f64]) -> Option<Summary> {
    if samples.is_empty() || samples.len() != floors.len() {
        return None;
    }
    let sorted = sorted(samples.to_vec());
    let median = quantile(&sorted, 0.5);
    let distances = self::sorted(samples.iter().map(|s| (s - median).abs()).collect());
    let ratios = self::sorted(samples.iter().zip(floors).map(|(s, f)| s / f).collect());
    let floor = quantile(&self::sorted(floors.to_vec()), 0.5);
    Some(Summary {
        median,
        mad: quantile(&distances, 0.5),
        min: sorted[0],
        max: sorted[sorted.len() - 1],
        ratio: quantile(&ratios, 0.5),
        ratio_low: quantile(&ratios, 0.25),
        ratio_high: quantile(&ratios, 0.75),
        net: median - floor,
    })
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// Linear between the two nearest of `sorted`, which is not empty.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        // The machine became twice as slow for one round: the ratio does not see it.
        let s = summary(&[100.0, 200.0, 101.0], &[50.0, 100.0, 50.5]).expect("samples");
        assert_eq!((s.ratio, s.ratio_low, s.ratio_high), (2.0, 2.0, 2.0));
        assert_eq!((s.median, s.min, s.max, s.mad), (101.0, 100.0, 200.0, 1.0));
        assert_eq!(s.net, 50.5);
    }

    #[test]
    fn one_outlier_moves_neither_median_nor_deviation() {
        let s = summary(&[10.0, 11.0, 12.0, 13.0, 9000.0], &[10.0; 5]).expect("samples");
        assert_eq!((s.median, s.mad), (12.0, 1.0));
    }

    #[test]
    fn nothing_comes_of_nothing_or_of_unequal_rounds() {
        assert_eq!(summary(&[], &[]), None);
        assert_eq!(summary(&[1.0], &[1.0, 1.0]), None);
    }
}
